"""Repairs of upstream faults, one function each: symptom, mechanism, remove when.

Every repair checks that what it replaces still looks as it did and raises where upstream moved it,
so that an upgrade is noticed at start and not in the answers.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import outlines_core as oc
import torch
from torch import Tensor

from patches import canonical
from patches.index_cache import IndexCache

_WATCH = "sieve-parent-watch"
_COMPILING_NICE = 10
_SPIN_S = 0.0005
_BGMV = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def apply() -> None:
    """Applies the repairs this platform needs; may be called any number of times."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        lora_rows_on_cpu()
        temperatures_on_cpu()
        waiting_without_spinning()
    bounded_grammars()
    grammars_without_queue()
    ids_without_tokens()
    end_with_parent()


def bounded_grammars() -> None:
    """Clients' grammars take the engine core's memory, and its processor from decoding.

    Symptom: with a vocabulary of 32,000, the index of a string of up to 256 characters takes 120
    MiB; 128 of them are kept, so 15 GB. Two threads that compile at once can fail with KeyError.
    Mechanism: `OutlinesBackend._compile_index` (0.32.0) keeps an LRU by number, without a lock.
    Here it is bounded by bytes, and the thread that compiles yields to those that decode. The
    unbounded cache on disk that `VLLM_V1_USE_OUTLINES_CACHE` turns on is not used.
    Remove when: upstream's cache is bounded by memory.

    Raises:
        RuntimeError: upstream's functions changed.
    """
    from vllm.v1.structured_output import backend_outlines, utils

    backend: Any = backend_outlines.OutlinesBackend
    if getattr(backend._compile_index, "_sieve_bounded", False):
        return
    _expect(backend._compile_index, ["self", "regex_string", "vocabulary"])
    _expect(utils.compile_regex_with_timeout, ["fn", "pattern"])
    indexes = IndexCache(max_entries=128, max_bytes=128 * 2**20)

    def compile_index(self: Any, regex_string: str, vocabulary: Any) -> oc.Index:
        def build_in_thread(pattern: str) -> oc.Index:
            thread = threading.get_native_id()
            nice = max(_COMPILING_NICE, os.getpriority(os.PRIO_PROCESS, thread))
            os.setpriority(os.PRIO_PROCESS, thread, nice)
            return oc.Index(pattern, vocabulary.inner)

        return indexes.get(
            f"{vocabulary._hash}_{regex_string}",
            lambda: utils.compile_regex_with_timeout(build_in_thread, regex_string),
        )

    compile_index._sieve_bounded = True  # type: ignore[attr-defined]
    backend._compile_index = compile_index


def grammars_without_queue() -> None:
    """A label waits for another client's schema to compile.

    Symptom: while a JSON schema compiles, for up to seconds, no new label is decoded on a machine
    with two cores.
    Mechanism: `StructuredOutputManager.grammar_init` (0.32.0) sends every grammar through a pool of
    half as many threads as cores, also one that is in its cache. Here a label structure's that is
    compiled already is set at once.
    Remove when: upstream looks into its cache first.

    Raises:
        RuntimeError: upstream's function changed.
    """
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_outlines import OutlinesBackend
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions

    manager: Any = StructuredOutputManager
    upstream = manager.grammar_init
    if getattr(upstream, "_sieve_direct", False):
        return
    _expect(upstream, ["self", "request"])

    @functools.wraps(upstream)
    def grammar_init(self: Any, request: Any) -> None:
        asked, backend = request.structured_output_request, self.backend
        if asked is not None and isinstance(backend, OutlinesBackend):
            kind, pattern = asked.structured_output_key
            if kind == StructuredOutputOptions.REGEX and canonical.is_known(
                pattern, backend.vocabulary.inner.get_eos_token_id()
            ):
                asked.grammar = backend.compile_grammar(kind, pattern)
                return
        upstream(self, request)

    grammar_init._sieve_direct = True  # type: ignore[attr-defined]
    manager.grammar_init = grammar_init


def ids_without_tokens() -> None:
    """A chat with `logprobs` ends the engine, by chance or on purpose.

    Symptom: TypeError in `output_handler`, and every request fails: the engine is dead.
    Mechanism: LLaVA's checkpoints have more rows than their tokenizer has tokens (32,064 for
    32,002). `detokenizer_utils.convert_ids_list_to_tokens` (0.32.0) spells the ids of log-
    probabilities, and `_restore_leading_spaces` iterates over the None that such an id has, for
    tokenizers with a Metaspace pre-tokenizer. It is enough that one is among the top ones, or that
    `logit_bias` asks for it.
    Remove when: upstream spells an id without a token as nothing, as it does in prompts.

    Raises:
        RuntimeError: upstream's function changed.
    """
    from vllm.tokenizers import detokenizer_utils

    upstream = detokenizer_utils._restore_leading_spaces
    if getattr(upstream, "_sieve_none", False):
        return
    _expect(upstream, ["raw_token", "token_str", "marker"])

    @functools.wraps(upstream)
    def restore(raw_token: str | None, token_str: str, marker: str) -> str:
        return upstream(raw_token or "", token_str, marker)

    restore._sieve_none = True  # type: ignore[attr-defined]
    detokenizer_utils._restore_leading_spaces = restore


def _expect(function: Callable[..., object], parameters: list[str]) -> None:
    found = list(inspect.signature(function).parameters)
    if found != parameters:
        raise RuntimeError(
            f"vLLM's {function.__qualname__} takes {found}, not {parameters}; see "
            "patches/repairs.py"
        )


def end_with_parent() -> None:
    """A killed server leaves its engine core and worker behind, with their memory or GPU.

    Symptom: after SIGKILL of the process that holds `AsyncLLM`, `VLLM::EngineCore` and its worker
    stay; on Ray the replacement then finds no memory.
    Mechanism: the worker watches a pipe from the core, and ends with it; nothing in the core
    watches its own parent (0.32.0). Not PR_SET_PDEATHSIG: that fires when the thread ends that
    started the process. Here a process that vLLM started looks every second who its parent is,
    from the moment it loads plugins; one orphaned before that gives its handshake up in 5 minutes.
    Remove when: vLLM's engine core ends with its parent.
    """
    parent = multiprocessing.parent_process()
    is_watched = any(thread.name == _WATCH for thread in threading.enumerate())
    if parent is None or parent.pid is None or is_watched:
        return
    if parent.pid != os.getppid() and parent.is_alive():
        return  # a fork server is between the two
    threading.Thread(target=_end_without, args=(parent.pid,), name=_WATCH, daemon=True).start()


def _end_without(parent: int, every_s: float = 1.0) -> None:
    while os.getppid() == parent:
        time.sleep(every_s)
    os._exit(1)


def lora_rows_on_cpu() -> None:
    """On CPU, a base-model request batched with adapters' requests gets an adapter's answer.

    Symptom: the base model's labels change with what else is in the batch; no error.
    Mechanism: a row without LoRA has index -1; `vllm/lora/ops/torch_ops/lora_ops.py` (0.32.0)
    gathers `weights[-1]`, the last adapter's. The gather also copies a whole factor for every
    token. Here rows are grouped by adapter and multiplied by its factor once; -1 is left alone.
    Remove when: vllm-project/vllm#48421 or #49656 is in the release.

    Raises:
        RuntimeError: upstream's functions changed.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    ours: dict[str, Callable[..., None]] = {
        "bgmv_shrink": bgmv_shrink,
        "bgmv_expand": bgmv_expand,
        "bgmv_expand_slice": bgmv_expand_slice,
    }
    for name in _BGMV:
        upstream, repaired = getattr(lora_ops, name), ours[name]
        if upstream is repaired:
            continue
        if list(inspect.signature(upstream).parameters) != list(
            inspect.signature(repaired).parameters
        ) or not hasattr(punica_cpu, name):
            raise RuntimeError(f"vLLM's {name} changed; see patches/repairs.py")
        setattr(lora_ops, name, repaired)  # the prefill variants call it from there
        setattr(punica_cpu, name, repaired)


def temperatures_on_cpu() -> None:
    """On CPU, a sampled chat beside a proposed label spoils both.

    Symptom: with speculative decoding and a temperature above 0 in the batch, wrong ids are taken.
    Mechanism: `_expand_kernel_impl` in `vllm/utils/cpu_triton_utils.py` (0.32.0) writes each row's
    temperature into a copy that is thrown away, so logits are divided by uninitialised memory.
    Remove when: it copies its result back, as the other functions there do.

    Raises:
        RuntimeError: upstream's function changed.
    """
    from vllm.v1.sample import rejection_sampler

    upstream = rejection_sampler.expand_batch_to_tokens
    if upstream is not expand_batch_to_tokens:
        _expect(upstream, list(inspect.signature(expand_batch_to_tokens).parameters))
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x: Tensor,
    cu_num_tokens: Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> Tensor:
    """A value a request `(B,)` as one a token `(T,)`; `cu_num_tokens` `(B,)` counts up to each."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to)


def waiting_without_spinning() -> None:
    """On CPU, a server that has nothing to do keeps half a core busy.

    Symptom: the worker of an idle server uses half of a core, and each process that waits for
    another a whole one while requests run.
    Mechanism: `SpinCondition.wait` (`shm_broadcast.py`, 0.32.0) polls with `sched_yield` for a
    second after a process's last message, such as the watchdog's every two seconds, before it waits
    for a notification; meant for GPUs, beside which cores are idle. Here it does so for half a
    millisecond.
    Remove when: upstream waits on CPU without spinning.

    Raises:
        RuntimeError: upstream's function changed.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    upstream: Any = SpinCondition.wait
    if getattr(upstream, "_sieve_waits", False):
        return
    _expect(upstream, ["self", "timeout_ms"])
    _expect(
        SpinCondition.__init__, ["self", "is_reader", "context", "notify_address", "busy_loop_s"]
    )

    @functools.wraps(upstream)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = min(self.busy_loop_s, _SPIN_S)
        upstream(self, timeout_ms)

    wait._sieve_waits = True  # type: ignore[attr-defined]
    SpinCondition.wait = wait


def _adapter_rows(weights: Tensor, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of each adapter in a batch, and its factor `(out, in)`; rows of index -1 are skipped."""
    for index in indices.unique().tolist():
        if index >= 0:
            rows = (indices == index).nonzero()[:, 0]
            yield rows, weights[index].reshape(weights.shape[-2:])


def bgmv_shrink(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    scaling: float = 1.0,
) -> None:
    """`output[:, :r] = scaling * inputs @ A^T`, each row with its adapter's A; 0 without one."""
    rank = lora_b_weights.shape[-2]
    output_tensor[:, :rank] = 0
    for rows, factor in _adapter_rows(lora_b_weights, lora_indices_tensor):
        product = inputs[rows].to(output_tensor.dtype) @ factor.to(output_tensor.dtype).T
        output_tensor[rows, :rank] = scaling * product


def bgmv_expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    add_inputs: bool = True,
) -> None:
    """`output += inputs @ B^T`, each row with its adapter's B; unchanged without one.

    Adapter and model may pad the output differently, so the common width counts.
    """
    width = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    _expand(inputs, lora_b_weights, output_tensor, lora_indices_tensor, 0, width, add_inputs)


def bgmv_expand_slice(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """`bgmv_expand` into columns `slice_offset` to `slice_offset + slice_size`."""
    _expand(
        inputs,
        lora_b_weights,
        output_tensor,
        lora_indices_tensor,
        slice_offset,
        slice_size,
        add_inputs,
    )


def _expand(
    inputs: Tensor,
    weights: Tensor,
    output: Tensor,
    indices: Tensor,
    offset: int,
    width: int,
    add_inputs: bool,
) -> None:
    columns = output[:, offset : offset + width]
    if not add_inputs:
        columns[:] = 0
    for rows, factor in _adapter_rows(weights, indices):
        product = inputs[rows].to(output.dtype) @ factor[:width].to(output.dtype).T
        columns.index_add_(0, rows, product)

"""The engine in this process: vLLM's `AsyncLLM` and its OpenAI chat classes.

The only module of `serving` that imports vLLM. Plain values come in (`serving.protocol`), vLLM's
own requests are built here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import multiprocessing
import os
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from serving.adapters import lora_room
from serving.engine_queue import EngineQueue, persistently
from serving.errors import (
    AdapterError,
    BadRequestError,
    ConfigError,
    EngineDeadError,
    FailedOnceError,
    OverloadedError,
    SieveError,
)
from serving.facts import engine_info
from serving.geometry import explained
from serving.loaded_adapters import LoadedAdapters
from serving.metrics import EngineMetrics
from serving.process_family import ProcessFamily
from serving.protocol import (
    Adapter,
    ChatCall,
    EngineInfo,
    Explanation,
    Generated,
    Generation,
    LoraRoom,
)
from serving.settings import Settings
from serving.streams import ENGINE_STOPPED, begun_stream, held_stream, without_leading_space
from serving.weights import check_base_files

logger = logging.getLogger("sieve.engine")


def prepare_environment(settings: Settings) -> None:
    """Environment that vLLM reads at import; what the operator set stays."""
    cores = sorted(os.sched_getaffinity(0))
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}"
        if cores == list(range(cores[0], cores[-1] + 1))
        else ",".join(map(str, cores)),
        # A start prints some forty of vLLM's warnings, about things that are as they should be.
        "VLLM_LOGGING_LEVEL": {"warning": "ERROR"}.get(
            settings.log_level, settings.log_level.upper()
        ),
        # Clients' grammars were tried out within a limit on processor time; this is wall time.
        "VLLM_REGEX_COMPILATION_TIMEOUT_S": "60",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


class VllmEngine:
    """An `Engine` on vLLM in this process; start it with `start`."""

    def __init__(
        self,
        llm: Any,
        chat: Any,
        models: Any,
        info: EngineInfo,
        adapters: LoadedAdapters,
        queue: EngineQueue,
    ) -> None:
        self._llm, self._chat, self._models = llm, chat, models
        self._queue = queue
        self._info = info
        self.adapters = adapters
        self._in_flight = 0
        self._processes = list(llm.engine_core.resources.engine_manager.processes)
        self._family = ProcessFamily(self._processes)
        self._is_hung, self._name = False, uuid.uuid4().hex
        self._was_killed: bool | None = None

    @classmethod
    async def start(
        cls,
        settings: Settings,
        adapters: Sequence[Adapter] = (),
        *,
        room: LoraRoom | None = None,
        metrics: EngineMetrics | None = None,
        is_again: bool = False,
    ) -> VllmEngine:
        """Loads the checkpoint and its adapters; takes half a minute on a small CPU machine.

        Args:
            settings: of the engine.
            adapters: loaded before the first request.
            room: what later adapters may need; by default what these need.
            metrics: told how long adapters take to load.
            is_again: this process serves meanwhile, so its event loop must go on; an adapter that
                cannot be loaded any more is left out.

        Raises:
            ConfigError: vLLM cannot serve the checkpoint or an adapter.
        """
        await asyncio.to_thread(check_base_files, settings.model, settings.base_sha256)
        prepare_environment(settings)
        import torch
        from vllm.v1.engine.async_llm import AsyncLLM

        # Threads of this process (image resizing) would spin beside those of the worker.
        torch.set_num_threads(1)

        try:
            room = room or lora_room(settings, adapters)
            queue = EngineQueue()
            make = functools.partial(
                AsyncLLM.from_engine_args,
                engine_args(settings, room),
                stat_loggers=[queue.stat_logger],
            )
            llm = await _started_beside(make) if is_again else make()
            queue.num_tokens = llm.get_num_queued_tokens
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"vLLM cannot serve {settings.model!r}: {error}") from error
        try:
            models = _served_models(llm, settings)
            chat = await asyncio.to_thread(_chat_server, llm, models)
            on_load = metrics.adapter_loaded if metrics else lambda seconds: None
            loaded = LoadedAdapters(_VllmSlots(llm), room, on_load)
            for adapter in adapters[: room.max_cpu_loras if room else 0]:
                try:
                    await loaded.prepare(adapter)
                except AdapterError as error:
                    if not is_again:
                        raise
                    # Requests for it hear why; the others are not to wait for it.
                    logger.error("adapter %r is not loaded again: %s", adapter.name, error.message)
        except BaseException:
            llm.shutdown()
            raise
        if llm.renderer.mm_processor is None:
            llm.shutdown()
            raise ConfigError(f"vLLM took {settings.model!r} for a text-only model; start again")
        info = replace(engine_info(settings), max_model_len=llm.model_config.max_model_len)
        engine = cls(llm, chat, models, info, loaded, queue)
        # vLLM keeps a traceback with this frame: what it names would outlive `close`.
        del llm, chat, models, loaded, make, queue
        return engine

    @property
    def info(self) -> EngineInfo:
        """Facts of the checkpoint."""
        return self._info

    async def generate(self, request: Generation) -> Generated:
        """Decodes one answer under its constraint, greedily."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.max_tokens,
            logprobs=request.num_logprobs,
            structured_outputs=StructuredOutputsParams(regex=request.pattern),
            output_kind=RequestOutputKind.FINAL_ONLY,
            detokenize=False,
        )
        async with self._serving(request.adapter):
            output = await persistently(
                functools.partial(self._decoded, request, params), waits=request.is_further
            )
        return _read_output(output)

    async def _decoded(self, request: Generation, params: Any) -> Any:
        with self._told_errors():
            self._llm.check_admission()  # before its images are processed
            (engine_input,) = await self._llm.renderer.render_cmpl_async([_prompt(request)])
            outputs = self._llm.generate(
                engine_input,
                params,
                request.request_id,
                lora_request=self._lora_request(request.adapter),
            )
            (output,) = [output async for output in outputs]
            if output.outputs[0].finish_reason == "error":
                raise self._failure(500, "", None)
            return output

    async def explain(self, request: Generation) -> list[Explanation]:
        """Which patches the request's images keep: the tower once more, past all caches."""
        renderer = self._llm.renderer
        async with self._serving(None):
            # VLLM processes images in this one thread, so that no two run at once.
            seen = await asyncio.get_running_loop().run_in_executor(
                renderer._mm_executor,
                renderer.mm_processor.look_at,
                request.images,
                request.retention,
            )
            pixels = seen["pixel_values"].float()
            args = (
                pixels.numpy().tobytes(),
                list(pixels.shape),
                seen["num_kept"].tolist(),
                [request.retention.selector] * len(pixels),
                seen["seed"].tolist(),
            )
            (found, *_) = await self._llm.collective_rpc("sieve_explain", args=args)
        processor = renderer.mm_processor.info.get_hf_processor().image_processor
        patch_size = self._llm.model_config.hf_config.vision_config.patch_size
        return explained(found, request.images, processor.to_dict(), patch_size, pixels.shape)

    async def chat(self, call: ChatCall) -> dict[str, Any] | AsyncIterator[str]:
        """Answers through vLLM's own OpenAI chat class."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        body = dict(call.body)
        if call.adapter is not None:
            body["model"] = call.adapter.key
        if call.pattern is not None:
            body["structured_outputs"] = {"regex": call.pattern}
        held = contextlib.AsyncExitStack()
        async with held:
            await held.enter_async_context(self._serving(call.adapter))
            if call.adapter is not None:
                self._models.lora_requests[call.adapter.key] = self._lora_request(call.adapter)
            # VLLM's types know no message of images alone; the app has checked them all.
            messages = body.pop("messages")
            request = ChatCompletionRequest(
                **body,
                messages=[],
                cache_salt=call.cache_salt,
                request_id=call.request_id,
                mm_processor_kwargs=call.retention.processor_kwargs(),
                add_special_tokens=self._adds_bos,
            )
            request.messages = list(messages)
            answer = await persistently(functools.partial(self._chatted, request), waits=False)
            if request.stream:  # the adapter stays in use until the last event
                events = answer if call.pattern is None else without_leading_space(answer)
                return held_stream(events, held.pop_all())
        completion: dict[str, Any] = answer.model_dump(mode="json")
        if call.pattern is not None:
            for choice in completion["choices"]:
                choice["message"]["content"] = (choice["message"]["content"] or "").lstrip()
        return completion

    async def _chatted(self, request: Any) -> Any:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        with self._told_errors():
            answer = await self._chat.create_chat_completion(request)
            if isinstance(answer, ErrorResponse):
                error = answer.error
                raise self._failure(error.code, error.message, error.param)
            return await begun_stream(answer, self._failure) if request.stream else answer

    def _failure(self, code: int, message: str, param: str | None) -> SieveError:
        """What a client is told of a request that vLLM did not answer."""
        if code < 500:
            return BadRequestError(first_line(message), param=param)
        if self._llm.errored:
            return EngineDeadError(ENGINE_STOPPED)
        if code == HTTPStatus.SERVICE_UNAVAILABLE:
            return self._queue.refusal()
        # As when vLLM believes that an image is in the engine, whose request was refused.
        return FailedOnceError("the engine failed on this request; try again shortly")

    @contextlib.contextmanager
    def _told_errors(self) -> Iterator[None]:
        """VLLM's errors as ours, and its full queue with the time to come again."""
        from vllm.exceptions import GenerationError, GracefulHTTPError

        with translated_errors():
            try:
                yield
            except GracefulHTTPError as error:
                raise self._queue.refusal() from error
            except GenerationError as error:
                raise self._failure(500, str(error), None) from error

    @contextlib.asynccontextmanager
    async def _serving(self, adapter: Adapter | None) -> AsyncIterator[None]:
        """One request's time in the engine: its adapter stays loaded, vLLM's errors become ours."""
        self._in_flight += 1
        try:
            with translated_errors():
                async with self.adapters.in_use(adapter):
                    yield
        except EngineDeadError as error:
            error.num_together, error.engine = self._in_flight, self._name
            error.is_crash = not await asyncio.to_thread(self._was_ended_from_outside)
            if self._is_hung:  # somebody may have stopped it: being alone in it proves little
                error.num_together = max(2, self._in_flight)
            raise
        finally:
            self._in_flight -= 1

    def _was_ended_from_outside(self) -> bool:
        """Whether a signal from outside ended the engine core: no request is to blame for that."""
        if self._was_killed is None:
            was_killed = self._family.was_ended_from_outside(wait_s=2.0)
            if self._was_killed is None:
                self._was_killed = was_killed
        return self._was_killed

    def _lora_request(self, adapter: Adapter | None) -> Any:
        if adapter is None:
            return None
        return _lora_request(adapter, self.adapters.path(adapter), self.adapters.number(adapter))

    @property
    def _adds_bos(self) -> bool:
        """LLaVA's chat template has no BOS, and LLaVA was trained with one."""
        tokenizer = self._llm.get_tokenizer()
        template = getattr(tokenizer, "chat_template", None) or ""
        bos = tokenizer.bos_token
        return bos is not None and "bos_token" not in template and bos not in template

    async def tower_images(self) -> int:
        """Images that went through the vision tower so far (of rank 0)."""
        with translated_errors():
            return int((await self._llm.collective_rpc("sieve_tower_images"))[0])

    async def check_health(self) -> None:
        """Raises `EngineDeadError` where the engine core or its worker is gone."""
        with translated_errors():
            await self._llm.check_health()

    async def ping(self) -> None:
        """Returns once the core and its worker answered, between two steps.

        Raises:
            EngineDeadError: they are gone.
        """
        with translated_errors():
            await self._llm.collective_rpc("check_health")

    async def kill(self, *, is_hung: bool = False) -> None:
        """Ends its processes with SIGKILL; whoever waits for it gets an `EngineDeadError`."""
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

        self._is_hung = is_hung
        if is_hung:
            self._was_killed = False  # not from outside: a request may be the cause
        await asyncio.to_thread(self._was_ended_from_outside)
        await asyncio.to_thread(self._family.kill)
        # VLLM tells requests that their engine is dead; its calls to the worker wait for ever.
        for answer in list(self._llm.engine_core.utility_results.values()):
            if not answer.done():
                answer.set_exception(VllmDeadError())
                answer.exception()  # seen: where nobody waits any more, nobody needs to hear of it

    async def close(self) -> None:
        """Stops the engine core and its worker."""
        self._llm.shutdown()
        await asyncio.to_thread(self._family.kill)  # a stopped worker hears nothing else
        self.adapters.close()
        self._llm = self._chat = self._models = None
        self._queue.num_tokens = lambda: 0  # of the engine that is gone
        del self.adapters  # it holds the engine as well
        gc.collect()  # it is in reference cycles; its destructor fails at interpreter exit


async def _started_beside(make: Callable[[], Any]) -> Any:
    """An `AsyncLLM`, started while the event loop goes on.

    Its processes are spawned: forked ones would inherit the sockets that are being served.
    """
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    others = set(multiprocessing.active_children())
    loop = asyncio.get_running_loop()
    starting = loop.run_in_executor(None, make)
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        while not starting.done():  # the start fails as soon as its core is gone
            for process in set(multiprocessing.active_children()) - others:
                if process.name.startswith("EngineCore"):
                    process.kill()
            await asyncio.wait({starting}, timeout=0.2)
        if starting.exception() is None:
            starting.result().shutdown()
        raise


def engine_args(settings: Settings, room: LoraRoom | None) -> Any:
    """VLLM's engine arguments of a server."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    return AsyncEngineArgs(
        model=settings.model,
        served_model_name=settings.served_name,
        load_format="safetensors",
        trust_remote_code=False,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_queued_tokens=_most_queued(settings),
        mm_processor_cache_gb=settings.image_cache_gib,
        limit_mm_per_prompt={"image": settings.max_images},
        enforce_eager=on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        gpu_memory_utilization=settings.gpu_memory,
        # Hits of the prefix cache need whole blocks, and prompts here are short: 32 is the least
        # that vLLM's CPU attention takes.
        block_size=32 if on_cpu else None,
        enable_prefix_caching=settings.prefix_caching,
        structured_outputs_config={"backend": "outlines"},
        hf_overrides=settings.sieve.hf_overrides(),
        worker_extension_cls="patches.worker.SieveWorker",
        max_logprobs=MAX_LOGPROBS,
        **(lora_args(room) if room else {}),
        **(_PROPOSALS if settings.label_proposals else {}),
    )


_PROPOSALS = {
    "scheduler_cls": "patches.proposals.ProposingScheduler",
    "speculative_config": {
        "method": "custom_class",
        "model": "patches.proposals.NoProposer",
        "num_speculative_tokens": 8,
    },
}
"""At most 8 ids are checked at once; a longer answer takes a further pass."""


def _most_queued(settings: Settings) -> int | None:
    """Prompt tokens that may wait: by default a full batch of the longest prompts."""
    if settings.max_queued_tokens is None:
        return settings.max_num_seqs * engine_info(settings).max_model_len
    return settings.max_queued_tokens or None


def lora_args(room: LoraRoom) -> dict[str, Any]:
    """Room for the adapters, in vLLM's words."""
    return {
        "enable_lora": True,
        "max_lora_rank": room.max_rank,
        "max_loras": room.max_loras,
        "max_cpu_loras": room.max_cpu_loras,
        # An image's encoder output then depends on the adapter: vLLM keys it by adapter as well.
        "enable_tower_connector_lora": room.has_projector,
    }


MAX_LOGPROBS = 160
"""More than any label structure branches at one step."""


def _served_models(llm: Any, settings: Settings) -> Any:
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    class NamedModels(OpenAIServingModels):
        """Answers name the adapter as its client does, without the digest of its key."""

        def model_name(self, lora_request: Any = None) -> str:
            return str(super().model_name(lora_request).split("@", 1)[0])

    return NamedModels(llm, [BaseModelPath(name=settings.served_name, model_path=settings.model)])


class _VllmSlots:
    """VLLM's adapter calls. Each runs between two steps of the engine, which waits for it."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    async def load(self, adapter: Adapter, path: str, number: int) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

        try:
            await self._llm.add_lora(_lora_request(adapter, path, number))
        except VllmDeadError:
            raise
        except Exception as error:  # whatever the worker met: it came back as text
            raise AdapterError(f"vLLM cannot load adapter {adapter.name!r}: {error}") from error

    async def unload(self, adapter: Adapter, number: int) -> None:
        await self._llm.remove_lora(number)

    async def pin(self, number: int) -> None:
        await self._llm.pin_lora(number)

    async def resident(self) -> set[int]:
        return set(await self._llm.list_loras())


def _lora_request(adapter: Adapter, path: str, number: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=adapter.key, lora_int_id=number, lora_path=path)


def _chat_server(llm: Any, models: Any) -> Any:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.renderers.online_renderer import OnlineRenderer

    template: dict[str, Any] = {
        "request_logger": None,
        "chat_template": None,
        "chat_template_content_format": "auto",
    }
    # The ratio travels in `mm_processor_kwargs`, which the app never takes from a client.
    renderer = OnlineRenderer(
        llm.model_config, llm.renderer, trust_request_mm_kwargs=True, **template
    )
    renderer.warmup()
    return OpenAIServingChat(
        llm,
        models,
        "assistant",
        online_renderer=renderer,
        enable_prompt_tokens_details=True,
        **template,
    )


def _prompt(request: Generation) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": request.prompt_ids}
    if request.cache_salt is not None:
        prompt["cache_salt"] = request.cache_salt
    if request.images:
        prompt["multi_modal_data"] = {"image": request.images}
        prompt["mm_processor_kwargs"] = request.retention.processor_kwargs()
    return prompt


def _read_output(output: Any) -> Generated:
    completion, stats = output.outputs[0], output.metrics
    steps = completion.logprobs or []
    queue_ms = prefill_ms = decode_ms = 0.0
    if stats is not None:
        queue_ms = 1e3 * (stats.scheduled_ts - stats.queued_ts)
        prefill_ms = 1e3 * (stats.first_token_ts - stats.scheduled_ts)
        decode_ms = 1e3 * (stats.last_token_ts - stats.first_token_ts)
    return Generated(
        token_ids=list(completion.token_ids),
        logprobs=[{i: entry.logprob for i, entry in step.items()} for step in steps],
        num_prompt_tokens=len(output.prompt_token_ids),
        num_cached_tokens=output.num_cached_tokens or 0,
        queue_ms=queue_ms,
        prefill_ms=prefill_ms,
        decode_ms=decode_ms,
    )


def first_line(message: str) -> str:
    """What of a message is for clients: further lines are of the inside, as are addresses."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", message.split("\n", 1)[0])[:500]


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """VLLM's and pydantic's complaints about a request, as ours."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

    try:
        yield
    except SieveError:
        raise
    except VllmDeadError as error:
        raise EngineDeadError(ENGINE_STOPPED) from error
    except GracefulHTTPError as error:
        raise OverloadedError(f"the server is at its limit: {error}; try again shortly") from error
    except (VLLMClientError, ValueError) as error:
        param = getattr(error, "parameter", None)
        raise BadRequestError(first_line(str(error)), param=param) from error

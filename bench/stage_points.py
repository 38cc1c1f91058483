"""Which calls are timed for `bench stages`: the one place that knows names inside vLLM and FastAPI.

A server under this clock runs unchanged code: every process that it starts imports `sitecustomize`
from a folder that `bench stages` made, which calls `install`. From then on a module of `POINTS` has
its functions wrapped as soon as it is imported, before anybody else has a reference to them.
Without that folder on PYTHONPATH nothing of this exists in a server.

Only the standard library here: see `bench.stage_clock`.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.stage_clock import StageClock

FOLDER_VARIABLE = "SIEVE_STAGES"
DUMMY_VARIABLE = "SIEVE_STAGES_DUMMY"
API, IMAGE, CORE, WORKER = "server", "image worker", "engine core", "model worker"

HTTP, PARSE, BASE64 = "HTTP", "HTTP parse, JSON, fields", "base64"
DECODE, RESIZE, CROSSING = "image decode", "resize", "image to and from its worker"
PROMPT, PIXELS, HASH = "prompt", "pixels", "hash"
INPUTS, MESSAGES, QUEUE = "vLLM's input processing", "serialisation between processes", "queue"
SCHEDULER, TOWER, SCORING = "scheduler", "tower", "[CLS] scoring"
SELECTION, PROJECTOR = "selection", "projector"
PREFILL, LATER = "prefill", "decode"
GRAMMAR, SAMPLING, RUNNER = "grammar", "sampling", "model runner"
OUTPUTS, ANSWER = "vLLM's output processing", "scores and answer's serialisation"
LOOP, HANDING = "server's other code", "hand-over between processes and threads"
UNATTRIBUTED = "unattributed"
STAGES = (
    *(HTTP, PARSE, BASE64, DECODE, RESIZE, CROSSING, PROMPT, HASH, PIXELS, INPUTS, MESSAGES, QUEUE),
    *(SCHEDULER, TOWER, SCORING, SELECTION, PROJECTOR, PREFILL, LATER, GRAMMAR, SAMPLING, RUNNER),
    *(OUTPUTS, ANSWER, LOOP, HANDING),
)
"""In the order of a request's way; what is left is `UNATTRIBUTED`."""
SCALING = (PROJECTOR, PREFILL)
"""What grows with the tokens that are kept."""


Change = Callable[[ModuleType], None]
"""Something done to a module right after it was loaded."""


@dataclass(frozen=True)
class Point:
    """A function that is timed.

    Attributes:
        module: where it is defined.
        name: of the function, or of the class and its method.
        stage: what its own time counts as, without that of timed calls inside it.
        role: the process it tells by being called there; empty where several call it.
        waits: whether it blocks on another process, so that its time is not work.
    """

    module: str
    name: str
    stage: str
    role: str = ""
    waits: bool = False


_RUNNER = "vllm.v1.worker.gpu_model_runner"
_LLAVA = "vllm.model_executor.models.llava"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_OUTLINES = "vllm.v1.structured_output.backend_outlines"
_SERIAL = "vllm.v1.serial_utils"
POINTS = (
    Point("uvicorn.protocols.http.httptools_impl", "HttpToolsProtocol.data_received", PARSE, API),
    Point("serving.bodies", "read_json", PARSE, API),
    Point("fastapi.dependencies.utils", "_validate_value_with_model_field", PARSE, API),
    Point("serving.images", "read_data_url", BASE64, API),
    Point("serving.image_worker", "ImageWorker.decode", CROSSING, API, waits=True),
    Point("serving.image_worker", "_answer", CROSSING, IMAGE),
    Point("serving.images", "decode_image", DECODE),
    Point("serving.fitting", "fit", RESIZE),
    Point("serving.prompts", "render_prompt", PROMPT),
    Point("serving.prompts", "encode", PROMPT),
    Point("vllm.renderers.base", "BaseRenderer._process_multimodal", INPUTS, API),
    Point("vllm.multimodal.hasher", "MultiModalHasher.hash_kwargs", HASH, API),
    Point("patches.processor", "SieveProcessor._call_hf_processor", PIXELS, API),
    Point("patches.selection", "image_seed", HASH),
    Point("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", INPUTS, API),
    Point(_SERIAL, "MsgpackEncoder.encode", MESSAGES),
    Point(_SERIAL, "MsgpackEncoder.encode_into", MESSAGES),
    Point(_SERIAL, "MsgpackDecoder.decode", MESSAGES),
    Point("vllm.v1.engine.core", "EngineCore.preprocess_add_request", SCHEDULER, CORE),
    Point("vllm.v1.engine.core", "EngineCoreProc._handle_client_request", SCHEDULER, CORE),
    Point(_SCHEDULER, "Scheduler.schedule", SCHEDULER, CORE),
    Point(_SCHEDULER, "Scheduler.update_from_output", SCHEDULER, CORE),
    Point(_SCHEDULER, "Scheduler.get_grammar_bitmask", GRAMMAR, CORE),
    Point("patches.canonical", "compile_index", GRAMMAR),
    Point(_OUTLINES, "OutlinesGrammar.accept_tokens", GRAMMAR),
    Point("vllm.distributed.device_communicators.shm_broadcast", "MessageQueue.enqueue", MESSAGES),
    Point("vllm.v1.executor.multiproc_executor", "WorkerProc._execute_worker_rpc", RUNNER, WORKER),
    Point("patches.model", "SieveLlavaForConditionalGeneration.embed_multimodal", SELECTION),
    Point("patches.tower", "ClsTower.__call__", TOWER),
    Point("patches.tower", "cls_logits", SCORING),
    Point("patches.tower", "cls_attention", SCORING),
    Point("patches.tower", "ClsProbe.forward", SCORING),
    Point("patches.selection", "select", SELECTION),
    Point(_LLAVA, "LlavaMultiModalProjector.forward", PROJECTOR),
    Point(_RUNNER, "GPUModelRunner._model_forward", PREFILL),
    Point(_LLAVA, "LlavaForConditionalGeneration.compute_logits", PREFILL),
    Point("vllm.v1.structured_output.utils", "apply_grammar_bitmask", GRAMMAR),
    Point(_RUNNER, "GPUModelRunner._sample", SAMPLING),
    Point(_RUNNER, "GPUModelRunner._bookkeeping_sync", SAMPLING),
    Point("vllm.v1.engine.output_processor", "OutputProcessor.process_outputs", OUTPUTS, API),
    Point("serving.scoring", "score", ANSWER),
    Point("serving.answers", "label_response", ANSWER, API),
    Point("fastapi._compat.v2", "ModelField.serialize", ANSWER),
    Point("fastapi._compat.v2", "ModelField.serialize_json", ANSWER),
)
FORWARD = POINTS.index(Point(_RUNNER, "GPUModelRunner._model_forward", PREFILL))
TASK_STEP = len(POINTS)
"""A step of a task on the server's event loop; not a function, so not in `POINTS`."""
NUM_POINTS = TASK_STEP + 1


def stage_of(point: int) -> str:
    """What a point's own time counts as."""
    return LOOP if point == TASK_STEP else POINTS[point].stage


def role_of(point: int) -> str:
    """The process that a point tells."""
    return API if point == TASK_STEP else POINTS[point].role


def install() -> None:
    """Times `POINTS` where there is a folder for it; called before anything else is imported."""
    changes: dict[str, list[Change]] = {}
    if folder := os.environ.get(FOLDER_VARIABLE):
        clock = StageClock(Path(folder))
        for number, point in enumerate(POINTS):
            changes.setdefault(point.module, []).append(_timing(clock, number, point))
        changes.setdefault("serving.logs", []).append(_watching_tasks(clock))
    if os.environ.get(DUMMY_VARIABLE):
        changes.setdefault("serving.engine", []).append(_with_random_weights)
    if changes:
        sys.meta_path.insert(0, _Finder(changes))


_HOOK = """\
import sys

sys.path.insert(0, {source!r})
from bench.stage_points import install

sys.path.remove({source!r})
for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
    del sys.modules[name]  # a server of another checkout has its own

install()
"""


def write_hook(folder: Path, source: Path) -> dict[str, str]:
    """Makes every Python process that is started with these variables call `install`.

    Args:
        folder: an existing one, for the hook.
        source: the checkout, where `bench` is found.
    """
    (folder / "sitecustomize.py").write_text(_HOOK.format(source=str(source)), encoding="utf-8")
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(source), *others])}


def _timing(clock: StageClock, number: int, point: Point) -> Change:
    def change(module: ModuleType) -> None:
        *owners, name = point.name.split(".")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part)
        found = vars(owner)[name]
        if isinstance(found, classmethod | staticmethod):
            setattr(owner, name, type(found)(clock.timed(found.__func__, number + 1)))
        else:
            setattr(owner, name, clock.timed(found, number + 1))

    return change


class _TimedSteps(Coroutine[Any, Any, Any]):
    """A task's coroutine, every step of it noted."""

    def __init__(self, inner: Coroutine[Any, Any, Any], clock: StageClock) -> None:
        self._inner, self._clock = inner, clock

    def send(self, value: Any) -> Any:
        """Runs to the next await."""
        start = time.perf_counter()
        try:
            return self._inner.send(value)
        finally:
            self._clock.note(TASK_STEP + 1, start, time.perf_counter())

    def throw(self, *args: Any) -> Any:
        """Runs to the next await, from an exception."""
        start = time.perf_counter()
        try:
            return self._inner.throw(*args)
        finally:
            self._clock.note(TASK_STEP + 1, start, time.perf_counter())

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield from self._inner.__await__())

    def close(self) -> None:
        """Ends it."""
        self._inner.close()


def _watching_tasks(clock: StageClock) -> Change:
    """The server's first call on its loop makes every later task a timed one."""

    def change(module: ModuleType) -> None:
        configure = module.configure_logs

        def and_watch(*args: Any, **kwargs: Any) -> Any:
            with suppress(RuntimeError):  # no loop: nothing to watch
                asyncio.get_running_loop().set_task_factory(_task_factory(clock))
            return configure(*args, **kwargs)

        module.configure_logs = and_watch  # type: ignore[attr-defined]

    return change


def _task_factory(clock: StageClock) -> Callable[..., asyncio.Task[Any]]:
    def make(loop: asyncio.AbstractEventLoop, inner: Any, **more: Any) -> asyncio.Task[Any]:
        steps: Any = _TimedSteps(inner, clock)
        return asyncio.Task(steps, loop=loop, **more)

    return make


def _with_random_weights(module: ModuleType) -> None:
    """The engine makes its weights up: a shape is measured, not a checkpoint."""
    make = module.engine_args

    def engine_args(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        made.load_format = "dummy"
        return made

    module.engine_args = engine_args  # type: ignore[attr-defined]


class _Finder:
    """Finds the modules that are changed, as all others are found, and changes them once loaded."""

    def __init__(self, changes: dict[str, list[Change]]) -> None:
        self._changes = changes

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec with our loader; None for all that are left alone."""
        if name not in self._changes:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._change_after_loading(spec.loader, self._changes[name])
        return spec

    @staticmethod
    def _change_after_loading(loader: Any, changes: Sequence[Change]) -> None:
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            for change in changes:
                change(module)

        loader.exec_module = exec_module


def check_points() -> list[str]:
    """Points whose function is not there any more; imports all of their modules."""
    missing = []
    for point in POINTS:
        owner: Any = importlib.import_module(point.module)
        for part in point.name.split("."):
            owner = getattr(owner, part, None)
        if not callable(owner):
            missing.append(f"{point.module}:{point.name}")
    return missing

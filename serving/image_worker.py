"""One process that decodes images, and the server's handle of it.

A decoder fed by strangers is taken for lost before it starts: it has a deadline that ends it from
outside, an alarm of its own should nobody outside be left, a bound on its memory, and it answers in
plain bytes. Nothing it says is unpickled, so that a decoder that was taken over stays where it is.
"""

from __future__ import annotations

import json
import resource
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from PIL import Image

from serving.errors import BadRequestError
from serving.fitting import HEAVY, Fitting, fit
from serving.geometry import with_sent_size
from serving.images import ImageLimits, decode_image
from serving.worker_process import end_with_parent, fork_server

BYTES_PER_PIXEL = 64
"""Memory that decoding and fitting may take for each pixel that is admitted."""
LEAST_MEMORY = 512 * 2**20
_ALARM_AFTER_S = 2.0
_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 5.0
_LONGEST_HEAD = 65_536
_READY = b"ready"


class WorkerLostError(Exception):
    """The process ended before it had answered.

    Args:
        is_outside: somebody else killed it, so the image is not to blame.
    """

    def __init__(self, *, is_outside: bool) -> None:
        super().__init__("an image worker ended")
        self.is_outside = is_outside


class ImageWorker:
    """A decoding process that can be killed and started again. One caller at a time.

    Args:
        limits: what is admitted.
        fitting: how images are fitted.
        timeout_s: for one image, after which the caller kills it.
    """

    def __init__(self, limits: ImageLimits, fitting: Fitting, timeout_s: float) -> None:
        self._limits, self._arguments = limits, (limits, fitting, timeout_s)
        self._context = _context(fitting)
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._is_busy, self._is_ours, self._is_closed = False, False, False
        self._lock = threading.Lock()  # the event loop kills what a thread talks to

    @property
    def pid(self) -> int | None:
        """Of its process; None where none runs."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Starts the process; blocks until it can decode.

        Raises:
            WorkerLostError: it could not be started.
        """
        pipe, theirs = self._context.Pipe()
        process = self._context.Process(
            target=work, args=(theirs, *self._arguments), daemon=True, name="sieve-image"
        )
        try:
            process.start()
            theirs.close()
            self._process, self._pipe, self._is_ours = process, pipe, False
            if self._is_closed or not pipe.poll(_START_TIMEOUT_S) or pipe.recv_bytes() != _READY:
                raise EOFError
        except (OSError, EOFError) as error:
            self.kill()
            self.end()
            raise WorkerLostError(is_outside=True) from error

    def decode(self, raw: bytes, name: str) -> Image.Image:
        """One image; blocks. A process that is lost is gone for sure when this returns.

        Raises:
            BadRequestError: the image is not admitted.
            WorkerLostError: the process ended, by itself or by `kill`.
        """
        assert self._pipe is not None, "it was started"
        self._is_busy = True
        try:
            head, pixels = self._ask(self._pipe, raw, name)
            return _read_answer(head, pixels)
        except BadRequestError:
            raise
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise WorkerLostError(is_outside=self.end()) from error
        finally:
            with self._lock:
                self._is_busy = False
            if self._is_ours:  # it answered, but too late
                self.end()

    def _ask(self, pipe: Connection, raw: bytes, name: str) -> tuple[dict[str, Any], bytes]:
        pipe.send_bytes(name.encode())
        pipe.send_bytes(raw)
        head = json.loads(pipe.recv_bytes(_LONGEST_HEAD))
        return head, pipe.recv_bytes(3 * max(self._limits.max_pixels, 2**24))

    def overdue(self) -> None:
        """Ends the process if it is still at work; whoever waits for it hears of that."""
        with self._lock:
            if self._is_busy:
                self._kill()

    def kill(self) -> None:
        """Ends the process at once."""
        with self._lock:
            self._kill()

    def _kill(self) -> None:
        self._is_ours = True
        if self._process is not None:
            self._process.kill()

    def end(self) -> bool:
        """Waits for the process to be gone, and makes sure; whether somebody else killed it."""
        with self._lock:
            process, pipe = self._process, self._pipe
            self._process = self._pipe = None
        if pipe is not None:
            pipe.close()
        if process is None:
            return False
        process.join(_END_TIMEOUT_S if not self._is_ours else 0)
        if process.exitcode is None:
            self._is_ours = True
            process.kill()
            process.join()
        return process.exitcode in (-signal.SIGKILL, -signal.SIGTERM) and not self._is_ours

    def close(self) -> None:
        """Ends the process for good."""
        self._is_closed = True
        self.kill()


def _context(fitting: Fitting) -> ForkServerContext:
    return fork_server([__name__, *(HEAVY if fitting.model else ())])


def _read_answer(head: Mapping[str, Any], pixels: bytes) -> Image.Image:
    if "error" in head:
        raise BadRequestError(str(head["error"]), param=head["param"], code=head["code"])
    (width, height), sent = head["size"], head["sent"]
    image = Image.frombytes("RGB", (int(width), int(height)), pixels)
    return with_sent_size(image, (int(sent[0]), int(sent[1])))


def work(pipe: Connection, limits: ImageLimits, fitting: Fitting, timeout_s: float) -> None:
    """The process: images in, pixels or complaints out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to answer
    processor = fitting.load()
    fit(processor, Image.new("RGB", (8, 8)))  # what is loaded on first use is loaded now
    _bound_memory(max(LEAST_MEMORY, BYTES_PER_PIXEL * limits.max_pixels))
    end_with_parent()
    pipe.send_bytes(_READY)
    while True:
        try:
            name, raw = pipe.recv_bytes().decode(), pipe.recv_bytes()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, timeout_s + _ALARM_AFTER_S)
        head, pixels = _answer(raw, name, limits, processor)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(json.dumps(head).encode())
        pipe.send_bytes(pixels)


def _bound_memory(more: int) -> None:
    """Allows so many bytes of address space on top of what is taken now."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = now + more if hard == resource.RLIM_INFINITY else min(now + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _answer(
    raw: bytes, name: str, limits: ImageLimits, processor: Any
) -> tuple[dict[str, Any], bytes]:
    try:
        image = decode_image(raw, limits, name)
        sent = image.size
        pixels = fit(processor, image)
    except BadRequestError as error:
        return {"error": error.message, "param": error.param, "code": error.code}, b""
    except Exception as error:  # no memory, or a picture that the processor cannot take
        reason = "more memory than is allowed" if _is_short_of_memory(error) else "too much"
        said = f"{name} needs {reason} to be brought to the model's size; scale it down"
        return {"error": said, "param": name, "code": "invalid_image"}, b""
    height, width, _ = pixels.shape
    return {"size": [width, height], "sent": list(sent)}, pixels.tobytes()


def _is_short_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "memory" in str(error)

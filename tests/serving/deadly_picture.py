"""A picture that ends whoever decodes it; alone here, as worker processes import this file."""

import os
import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class DeadlyPicture:
    """Ends the process that reads it, as a decoder that crashes does."""

    name = "deadly"

    def read_bytes(self) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it is gone")

"""Processors that misbehave on images of some sizes; alone here, as workers import this file."""

import ctypes
import os
import signal
import time
from dataclasses import dataclass

import numpy as np

from serving.fitting import Fitting

SLEEPER, CRASHER, GLUTTON, SPINNER = (91, 17), (92, 17), (93, 17), (94, 17)
"""Sizes of images that hang, crash, eat memory or compute for ever."""


def misbehaving(image, **_):
    """What an image processor is called with; gives the image back as it is."""
    if image.size == SLEEPER:
        time.sleep(600)
    if image.size == CRASHER:
        os.kill(os.getpid(), signal.SIGSEGV)
    if image.size == GLUTTON:
        np.ones(2**33, dtype=np.uint8)
    if image.size == SPINNER:
        ctypes.PyDLL(None).sleep(600)  # a C function that keeps the interpreter lock
    return {"pixel_values": [np.asarray(image).transpose(2, 0, 1)]}


@dataclass(frozen=True, kw_only=True)
class HostileFitting(Fitting):
    """Stands for a decoder with a hole."""

    def load(self):
        return misbehaving

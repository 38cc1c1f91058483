"""Buffers of the worker on a CPU: freed ones stay for the next layer instead of going back.

glibc maps what is over 32 MiB anew at each allocation, unmaps it when it is freed, and the kernel
fills every page of it with zeros first. The activations of eight images in the tower, or of 2,048
tokens in a 7B layer, are that big, so each layer pays for them again: a quarter of the tower's
time. vLLM advises another allocator (tcmalloc in LD_PRELOAD) for this; here glibc keeps them.

Only from the first image on: oneDNN repacks weights while they load, and what is freed then, 7 GiB
of LLaVA-1.5-7B's, has to go back.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Mapping

logger = logging.getLogger("sieve.memory")

KEPT_BYTES = 256 << 20
"""Smaller buffers are kept; weights and the KV cache above it are mapped as before."""
TRIM_BYTES = 512 << 20
"""So much may lie free at the heap's end."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def is_chosen(environment: Mapping[str, str]) -> bool:
    """Whether the operator has chosen an allocator, or settings of glibc's."""
    preloaded = environment.get("LD_PRELOAD", "")
    return (
        any(name.startswith("MALLOC_") for name in environment)
        or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
        or "malloc" in preloaded
    )


@functools.cache
def keep_buffers() -> bool:
    """Lets this process keep freed buffers from now on; what the operator chose stays.

    Returns:
        Whether it does.
    """
    if is_chosen(os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_M_MMAP_THRESHOLD, KEPT_BYTES), (_M_TRIM_THRESHOLD, TRIM_BYTES))
    if mallopt is None or not all(mallopt(name, value) for name, value in settings):
        logger.warning("this C library does not keep freed buffers: big batches run slower on CPU")
        return False
    return True

"""Buffers that a worker keeps: pages are zeroed once, and an operator's choice stays."""

import os
import subprocess
import sys

import pytest

from patches.memory import is_chosen

NUM_LAYERS, MIB = 16, 1 << 20
FAULTS = f"""
import resource, torch
from patches.memory import keep_buffers
is_kept = keep_buffers()
def run():
    for _ in range({NUM_LAYERS}):
        torch.empty({64 * MIB}, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = run()
print(is_kept, run() - before)
"""


def page_faults(environment):
    """Of as many layers that each need 64 MiB, once as many have run."""
    ended = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    is_kept, faults = ended.stdout.split()
    return is_kept == "True", int(faults)


def test_layers_find_the_buffers_of_those_before_them_instead_of_new_pages():
    is_kept, with_kept = page_faults({})
    chosen, without = page_faults({"MALLOC_MMAP_THRESHOLD_": str(32 * MIB)})
    assert (is_kept, chosen) == (True, False)
    assert without >= NUM_LAYERS * 32, "even pages of 2 MiB make 32 faults a layer"
    assert with_kept <= without / 4


@pytest.mark.parametrize(
    "environment",
    [
        {"LD_PRELOAD": "/usr/lib/libtcmalloc_minimal.so.4"},
        {"LD_PRELOAD": "libjemalloc.so.2:libiomp5.so"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0"},
    ],
)
def test_what_the_operator_chose_stays(environment):
    assert is_chosen(environment)
    assert not is_chosen({"LD_PRELOAD": "libiomp5.so", "OMP_NUM_THREADS": "2"})

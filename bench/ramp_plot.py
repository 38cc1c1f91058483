"""Four panels over time: load, replicas, queue wait, latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.generator import Request
from bench.outcome import BenchError
from bench.profiles import Phase
from bench.watch import Look

PLOT_KINDS = (".png", ".svg")
BIN_S = 5.0
_ASKED, _SERVED = "#b0b0b0", "#1f77b4"


def load_matplotlib() -> Any:
    """Its pyplot, without a display.

    Raises:
        BenchError: it is not installed; says what to do.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("--plot needs matplotlib: pip install 'llava-sieve[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def binned_rates(times_s: Sequence[float], end_s: float) -> tuple[list[float], list[float]]:
    """Middles of bins of `BIN_S` seconds, and events a second in each."""
    edges = np.arange(0.0, end_s + BIN_S, BIN_S)
    counts, _ = np.histogram(list(times_s), edges)
    return list(edges[:-1] + BIN_S / 2), list(counts / BIN_S)


def binned_p95(rows: Sequence[Request], end_s: float) -> tuple[list[float], list[float]]:
    """Middles of bins by when requests were due, and the p95 of their seconds; empty bins left out.

    Of fewer than 20 answers that is the longest.
    """
    edges = np.arange(0.0, end_s + BIN_S, BIN_S)
    middles, found = [], []
    for low in edges[:-1]:
        seconds = [
            row.seconds for row in rows if row.status == 200 and low <= row.intended_s < low + BIN_S
        ]
        if seconds:
            middles.append(float(low) + BIN_S / 2)
            found.append(float(np.percentile(seconds, 95, method="higher")))
    return middles, found


def draw(
    path: Path, title: str, phases: Sequence[Phase], rows: Sequence[Request], looks: Sequence[Look]
) -> None:
    """Writes the plot."""
    pyplot = load_matplotlib()
    ends = np.cumsum([phase.seconds for phase in phases])
    end_s = max([float(ends[-1]), *(row.done_s for row in rows)])
    figure, panels = pyplot.subplots(4, 1, sharex=True, figsize=(9, 9), layout="constrained")
    load, replicas, wait, latency = panels
    asked = binned_rates([row.intended_s for row in rows], end_s)
    served = binned_rates([row.done_s for row in rows if row.status == 200], end_s)
    load.plot(*asked, color=_ASKED, linewidth=3, label="asked")
    load.plot(*served, color=_SERVED, label="answered")
    load.set_ylabel("requests/s")
    at_s = [look.at_s for look in looks]
    targets, counts = [look.target for look in looks], [look.running for look in looks]
    replicas.step(at_s, targets, where="post", color=_ASKED, linewidth=3, label="target")
    replicas.step(at_s, counts, where="post", color=_SERVED, label="running")
    replicas.set_ylabel("replicas")
    replicas.yaxis.get_major_locator().set_params(integer=True)
    wait.plot(at_s, [look.queue_wait_s for look in looks], color=_SERVED, label="longest of 5 s")
    wait.set_ylabel("queue wait, s")
    latency.plot(*binned_p95(rows, end_s), color=_SERVED, marker=".", label=f"p95 of {BIN_S:g} s")
    latency.set_ylabel("latency, s")
    latency.set_xlabel("seconds")
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(loc="upper right", fontsize="small")
        for end in ends[:-1]:
            panel.axvline(float(end), color="black", alpha=0.15, linewidth=0.8)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path)
    pyplot.close(figure)

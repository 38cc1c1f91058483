"""What a soak tells from what it saw; the long one starts the server."""

import itertools
import os
from collections import Counter

import httpx
import numpy as np
import pytest

from bench.__main__ import build_parser, main
from bench.answers import FAILED, OK, REFUSED
from bench.bad_requests import BAD
from bench.process_tree import Usage, usage
from bench.soak import LEFT, WRONG, Run, SoakLoad, summarise
from bench.statistics import slope


def options(*argv):
    return build_parser().parse_args(["soak", *argv])


def usages(growth_mib_per_hour, minutes=20):
    rng = np.random.default_rng(0)
    return [
        (
            at,
            Usage(
                rss=int((2000 + growth_mib_per_hour * at / 3600 + rng.normal(0, 5)) * (1 << 20)),
                descriptors=100,
                threads=50,
                processes=4,
            ),
        )
        for at in range(0, 60 * minutes, 5)
    ]


def a_run(counts, growth=0.0):
    return Run(
        rate=8.0,
        capacity=10.0,
        counts=Counter(counts),
        details=["3 s: failed 500"],
        dropped=0,
        replaced=2,
        usages=usages(growth),
        left_over=0,
    )


GOOD = {("good", OK): 90, ("bad", OK): 5, ("leave", LEFT): 4, ("good", REFUSED): 1}


def test_refusals_and_leavers_are_explained():
    outcome = summarise(a_run(GOOD), options())
    assert outcome.status == 0
    assert ["sent", 100] in outcome.rows
    assert ["unexplained failures", 0] in outcome.rows


@pytest.mark.parametrize("kind", [("good", FAILED), ("bad", WRONG), ("leave", FAILED)])
def test_one_unexplained_failure_ends_with_1(kind):
    outcome = summarise(a_run({**GOOD, kind: 1}), options())
    assert outcome.status == 1
    assert ["unexplained failures", 1] in outcome.rows


@pytest.mark.parametrize(("growth", "is_noise"), [(0.0, True), (300.0, False), (-300.0, True)])
def test_growth_is_told_from_noise(growth, is_noise):
    outcome = summarise(a_run(GOOD, growth), options())
    assert any("within noise" in note for note in outcome.notes) == is_noise
    found = outcome.results["memory_mib_per_hour"]
    assert found["low"] <= growth <= found["high"]


def test_a_slope_needs_a_line():
    with pytest.raises(ValueError, match="make no line"):
        slope([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    exact = slope(range(50), [3 * x + 1 for x in range(50)])
    assert exact.value == pytest.approx(3)
    assert (exact.low, exact.high) == (pytest.approx(3), pytest.approx(3))


def test_usage_sees_this_process(tmp_path):
    before = usage(1_000_000_000)
    assert before == Usage(rss=0, descriptors=0, threads=0, processes=0)
    first = usage(os.getpid())
    files = [(tmp_path / str(number)).open("w") for number in range(10)]
    second = usage(os.getpid())
    for file in files:
        file.close()
    assert first.rss > 1 << 20
    assert second.descriptors == first.descriptors + 10


async def test_each_bad_request_must_be_refused_as_it_should_be():
    """A server that answers everything with 200 fails every bad request; one that is busy none."""

    def reply(status, headers=()):
        transport = httpx.MockTransport(lambda _: httpx.Response(status, headers=dict(headers)))
        return httpx.AsyncClient(transport=transport, base_url="http://soak")

    some = list(itertools.islice(BAD.values(), 0, None, 40))
    for status, headers, expected in (
        (200, [], WRONG),
        (500, [], WRONG),
        (503, [], WRONG),
        (503, [("retry-after", "1")], REFUSED),
    ):
        async with reply(status, headers) as client:
            load = SoakLoad(client, 1.0, options())
            found = [(await load._refused(request))[0] for request in some]
        assert set(found) == {expected}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_minutes_of_everything_at_once_leave_nothing_unexplained(capsys):
    assert main(["soak", "--minutes", "2", "--replace-s", "15", "--capacity-s", "10"]) == 0
    table = capsys.readouterr().out
    assert "unexplained failures" in table

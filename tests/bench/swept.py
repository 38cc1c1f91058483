"""A sweep's findings made by hand: what a server would have to do for known results."""

from dataclasses import replace

from bench.__main__ import build_parser
from bench.cells import cells_of
from bench.flops import Shape
from bench.generator import Request
from bench.goodput import Goal, Probe, Search
from bench.mix import Content
from bench.roofline import Device
from bench.sweep_results import summarise
from bench.sweeping import Block, Found

NAMES = ("negative", "neutral", "positive")
CELLS = cells_of((1.0, 0.4), ("cls", "random"))
SECONDS = {"1/cls": 2.0, "0.4/cls": 1.0, "0.4/random": 1.25}
WRONG = {"1/cls": 10, "0.4/cls": 10, "0.4/random": 3}
"""Every so manieth answer is wrong."""
MACHINE = Device(name="it", flops_per_s=1e11, bytes_per_s=1e10, source="float32, by hand")
SHAPE = Shape(image_size=112, layers=3, width=128, mlp=352, tower_layers=4, tower_width=128)


def options(*argv):
    return build_parser().parse_args(["sweep", "--ask", "llavac", *argv])


def request(number, seconds=0.1, *, at_s=0.0, label="", status=200, **known):
    return Request(
        number=number,
        id=str(number),
        phase="",
        intended_s=at_s,
        sent_s=at_s,
        done_s=at_s + seconds,
        status=status,
        label=label,
        error="" if status == 200 else "busy",
        is_dropped=False,
        **known,
    )


def truth(number):
    return NAMES[number % 3]


def answer(cell, number):
    wrong = number % WRONG[cell.name] == 0
    return '{"multimodal": "%s"}' % (NAMES[(number + 1) % 3] if wrong else truth(number))


def block(cell, index, numbers):
    seconds = SECONDS[cell.name] * (1 + 0.1 * index)
    known = {"kept": round(64 * cell.ratio), "prompt_tokens": 40 + round(64 * cell.ratio)}
    rows = [
        request(number, seconds, label=answer(cell, number), completion_tokens=5, **known)
        for number in numbers
    ]
    return Block(round=index, cell=cell, rows=rows)


def probe(load, capacity, seconds, count=200):
    rate = load * capacity
    rows = [request(number, seconds, at_s=number / rate) for number in range(count)]
    return Probe(load=load, rate=rate, rows=rows)


def searched(capacity, fits):
    """A search on a server that is fast up to a share of what saturates it."""
    search = Search(capacity=capacity, goal=Goal(ms=500, share=0.95))
    while (load := search.next_load) is not None:
        search.add(probe(load, capacity, 0.2 if load <= fits else 0.9))
    return search


def found_by_hand(num_rounds=5, size=60, num_tower_images=900):
    numbers = [range(size * index, size * (index + 1)) for index in range(num_rounds)]
    posts = {
        str(number): Content(
            id=str(number), text="", images=(), labels={"multimodal": truth(number)}
        )
        for number in range(num_rounds * size)
    }
    full = CELLS[0]
    return Found(
        posts=posts,
        connections=32,
        levels=[(full, 16, 20.0), (full, 32, 30.0)],
        blocks=[
            block(cell, index, numbers[index]) for index in range(num_rounds) for cell in CELLS
        ],
        drift=[block(full, 0, numbers[0]), block(full, 0, numbers[0])],
        searches={
            cell.name: (cell, searched(size / SECONDS[cell.name], 0.6)) for cell in CELLS[:2]
        },
        num_images=900,
        num_tower_images=num_tower_images,
    )


def outcome_by_hand(found=None, *argv):
    found = found or found_by_hand()
    return summarise(found, CELLS, SHAPE, MACHINE, options(*argv))


def with_failure(found):
    """The same, but that the first post of the last block was refused."""
    last = found.blocks[-1]
    rows = [replace(last.rows[0], status=503, label=""), *last.rows[1:]]
    found.blocks[-1] = replace(last, rows=rows)
    return found

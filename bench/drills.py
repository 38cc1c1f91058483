"""The faults: each strikes the running application once and says what it killed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from safetensors.numpy import load_file, save_file

from bench.answers import Answer
from bench.outcome import BenchError
from bench.pictures import picture_url
from bench.poison import PHRASE
from bench.process_tree import descendants, engine_core, worker_of

if TYPE_CHECKING:  # Ray is slow to import, and other commands do not need it
    from bench.two_nodes import RayHome

ADAPTER = "llavac"
SIZE = (112, 112)
_TOLERANCE = 0.03
_VOLLEY = 12
_ON_ITS_WAY_S = 0.1


@dataclass(kw_only=True)
class Strike:
    """What a drill did.

    Attributes:
        killed: processes that must be gone, and whatever they started with them.
        notes: what else was found, for the reader.
        is_over: a drill that lasts is over when it returns; others when as many engines run.
    """

    killed: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_over: bool = False


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a drill may use.

    Attributes:
        home: the application.
        client: of its HTTP side.
        folder: its adapters.
        probes: answers to the fixed posts of the adapter drill, filled by the load.
        volley: sends so many requests at once.
        in_flight: requests that are not answered yet.
    """

    home: RayHome
    client: httpx.AsyncClient
    folder: Path
    probes: list[tuple[int, dict[str, Any]]]
    volley: Callable[[int], None]
    in_flight: Callable[[], int]


Drill = Callable[[Scene], Awaitable[Strike]]


def _with_descendants(pid: int) -> list[int]:
    return [pid, *descendants(pid)]


async def _an_engine(scene: Scene) -> int:
    replicas = await asyncio.to_thread(scene.home.replicas)
    if len(replicas) < 2:
        raise BenchError(f"{len(replicas)} engines run, two are needed")
    return replicas[0].pid


async def _when_busy(scene: Scene) -> str:
    """Gives every engine work to lose; says how much there is."""
    scene.volley(_VOLLEY)
    await asyncio.sleep(_ON_ITS_WAY_S)
    return f"struck with {scene.in_flight()} requests in flight"


async def replica(scene: Scene) -> Strike:
    """SIGKILL of an engine replica's process."""
    pid = await _an_engine(scene)
    killed = _with_descendants(pid)
    note = await _when_busy(scene)
    os.kill(pid, signal.SIGKILL)
    return Strike(killed=killed, notes=[note])


async def engine(scene: Scene) -> Strike:
    """SIGKILL of a replica's engine core."""
    pid = await _an_engine(scene)
    killed, core = _with_descendants(pid), engine_core(pid)
    note = await _when_busy(scene)
    os.kill(core, signal.SIGKILL)
    return Strike(killed=killed, notes=[note])


async def hang(scene: Scene) -> Strike:
    """SIGSTOP of a replica's worker: nothing ends, nothing answers."""
    pid = await _an_engine(scene)
    killed = _with_descendants(pid)
    worker = worker_of(engine_core(pid))
    note = await _when_busy(scene)
    os.kill(worker, signal.SIGSTOP)
    return Strike(killed=killed, notes=[note])


async def node(scene: Scene) -> Strike:
    """SIGKILL of the raylet of the second node."""
    everything = ("Engine", "Ingress", "Coordinator")
    found = [r for name in everything for r in await asyncio.to_thread(scene.home.replicas, name)]
    note = await _when_busy(scene)
    lost = await asyncio.to_thread(scene.home.kill_second_node)
    there = [replica for replica in found if replica.node == lost]
    names = ", ".join(sorted(replica.deployment for replica in there)) or "nothing"
    killed = [pid for replica in there for pid in _with_descendants(replica.pid)]
    return Strike(killed=killed, notes=[f"on the lost node: {names}", note])


async def controller(scene: Scene) -> Strike:
    """SIGKILL of Serve's controller."""
    pid = await asyncio.to_thread(scene.home.controller)
    os.kill(pid, signal.SIGKILL)
    return Strike(killed=[pid])


async def update(scene: Scene) -> Strike:
    """The application is deployed again with another retention: every replica is replaced."""
    settings = scene.home.settings
    other = 0.5 if settings.retention == 1.0 else 1.0
    changed = settings.model_copy(update={"retention": other})
    before = await asyncio.to_thread(scene.home.replicas)
    await asyncio.to_thread(scene.home.deploy, changed)
    after = {replica.pid for replica in await asyncio.to_thread(scene.home.replicas)}
    kept = sum(replica.pid in after for replica in before)
    return Strike(is_over=True, notes=[f"{len(before) - kept} of {len(before)} engines replaced"])


async def adapter(scene: Scene) -> Strike:
    """A new version of an adapter takes over by HTTP while requests for it run."""
    old = await known_answers(scene.client)
    folder = scene.folder / f"{ADAPTER}@2"
    write_turned_adapter(scene.folder / ADAPTER, folder)
    answer = await scene.client.post("/v1/adapters", json={"name": ADAPTER, "version": "2"})
    if answer.status_code != 200:
        raise BenchError(f"the new version was refused: {answer.text}")
    new = await known_answers(scene.client)
    await asyncio.sleep(2)
    return Strike(is_over=True, notes=[versions_note(scene.probes, old, new)])


async def poison(scene: Scene) -> Strike:
    """A request that kills its engine, sent until it is refused."""
    home, notes = scene.home, []
    killed: list[int] = []
    for number in (1, 2, 3):
        before = {r.pid: descendants(r.pid) for r in await asyncio.to_thread(home.replicas)}
        body = {"model": "demo", "text": PHRASE, "image": picture_url(7, 7, SIZE)}
        notes.append(await _when_busy(scene))
        answer = await scene.client.post("/v1/label", json=body)
        code = (answer.json().get("error") or {}).get("code")
        await asyncio.sleep(4)
        after = {r.pid for r in await asyncio.to_thread(home.replicas)}
        dead = [pid for pid in before if pid not in after]
        killed += [each for pid in dead for each in (pid, *before[pid])]
        notes.append(f"sending {number}: {answer.status_code} {code}, {len(dead)} engine(s) died")
        if code == "quarantined" and not dead:
            break
        if code != "quarantined":
            await until_running(home, len(before))
    return Strike(killed=killed, notes=["poison " + "; ".join(notes)])


DRILLS: dict[str, Drill] = {
    "replica": replica,
    "engine": engine,
    "hang": hang,
    "poison": poison,
    "controller": controller,
    "adapter": adapter,
    "update": update,
    "node": node,
}
"""In the order in which they run; the last leaves one node."""


async def until_running(home: RayHome, num_engines: int, timeout_s: float = 300) -> bool:
    """Waits until so many engines run; whether they do."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while len(await asyncio.to_thread(home.replicas)) < num_engines:
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.25)
    return True


NUM_PROBES = 4


def probe_body(number: int) -> dict[str, Any]:
    """A fixed post for the adapter."""
    return {
        "model": ADAPTER,
        "text": ("a great day", "a very bad phone", "rain again", "the park")[number],
        "image": picture_url(11, number, SIZE),
        "retention_ratio": 1.0,
    }


async def known_answers(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The adapter's answers to the fixed posts."""
    answers = []
    for number in range(NUM_PROBES):
        answer = await client.post("/v1/label", json=probe_body(number))
        if answer.status_code != 200:
            raise BenchError(f"a probe was not answered: {answer.text}")
        answers.append(answer.json()["probabilities"])
    return answers


def distance(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Largest difference of two answers' probabilities."""
    return max(
        abs(first[field][label] - second[field][label]) for field in first for label in first[field]
    )


def versions_note(
    probes: list[tuple[int, dict[str, Any]]], old: list[dict[str, Any]], new: list[dict[str, Any]]
) -> str:
    """Which version each answer is of; one that is of neither is mixed."""
    found = {"old": 0, "new": 0, "mixed": 0}
    for number, answer in probes:
        far = distance(old[number], answer), distance(new[number], answer)
        which = "old" if far[0] < far[1] else "new"
        found[which if min(far) <= _TOLERANCE else "mixed"] += 1
    apart = min(distance(*pair) for pair in zip(old, new, strict=True))
    return f"{ADAPTER}'s answers: {json.dumps(found)}; versions are {apart:.2f} apart at least"


def write_turned_adapter(source: Path, target: Path) -> None:
    """The same adapter with the sign of every second factor turned: other answers, same shape."""
    shutil.rmtree(target, ignore_errors=True)
    draft = target.with_name(f".{target.name}")
    shutil.copytree(source, draft, dirs_exist_ok=True)
    weights = load_file(draft / "adapter_model.safetensors")
    turned = {name: -each if "lora_B" in name else each for name, each in weights.items()}
    save_file(turned, draft / "adapter_model.safetensors", {"format": "pt"})
    draft.rename(target)


def left_behind(killed: list[int], is_alive: Callable[[int], bool]) -> int:
    """Processes that outlived what they belong to."""
    return sum(map(is_alive, killed))


def tally_of(answers: list[Answer]) -> dict[str, list[str]]:
    """Details by outcome, for the notes."""
    details: dict[str, list[str]] = {}
    for answer in answers:
        if answer.detail and answer.detail not in details.setdefault(answer.outcome, []):
            details[answer.outcome].append(answer.detail)
    return details

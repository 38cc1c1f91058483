"""Many connections at once: who is busy then, with what."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bench.outcome import progress
from bench.stage_server import TIMED, Client, Question, StageServers
from bench.stage_spans import Span, busy


@dataclass(frozen=True, kw_only=True)
class Load:
    """A block of posts, as many at once as there are connections.

    Attributes:
        ratio: of all of them.
        posts: how many.
        start: on the machine's clock.
        end: when the last was answered.
        processor_s: processor time of the server's processes meanwhile, by role.
        busy_s: time inside timed calls, by role and stage.
    """

    ratio: float
    posts: int
    start: float
    end: float
    processor_s: Mapping[str, float]
    busy_s: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of the whole block."""
        return self.end - self.start

    def with_busy(self, spans: Sequence[Span]) -> Load:
        """The same, with what was noted meanwhile."""
        return replace(self, busy_s=busy(spans, self.start, self.end))


def saturate(
    servers: StageServers,
    question: Question,
    *,
    ratio: float,
    first: int,
    connections: int,
    posts: int,
) -> Load:
    """Sends posts in closed loop to the timed server.

    Args:
        servers: that run.
        question: what is asked.
        ratio: of all posts.
        first: number of the first post.
        connections: at once.
        posts: how many.

    Raises:
        BenchError: a post was not labelled.
    """
    bodies = [question.body(first + index, ratio) for index in range(posts)]
    before = servers.processor_seconds()
    start = time.perf_counter()
    send_all(servers.ports[TIMED], bodies, connections)
    end = time.perf_counter()
    after = servers.processor_seconds()
    progress(f"saturated, ratio {ratio:g}: {posts / (end - start):.1f} posts/s")
    spent = {role: seconds - before.get(role, 0.0) for role, seconds in after.items()}
    return Load(ratio=ratio, posts=posts, start=start, end=end, processor_s=spent)


def send_all(port: int, bodies: Sequence[bytes], connections: int) -> None:
    """Sends bodies to a server, as many at once as there are connections.

    Raises:
        BenchError: one is not answered by a 200.
    """
    waiting, failures = iter(bodies), list[Exception]()
    lock = threading.Lock()

    def send() -> None:
        client = Client(port)
        try:
            while True:
                with lock:
                    body = next(waiting, None)
                if body is None or failures:
                    return
                client.label(body)
        except Exception as error:
            failures.append(error)
        finally:
            client.close()

    threads = [threading.Thread(target=send) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]

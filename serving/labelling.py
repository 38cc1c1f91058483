"""Labels of many posts: read, sent a bounded number at a time, written in order, summed up."""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tqdm import tqdm

from serving.catalogue import Choices
from serving.errors import BadRequestError, ConfigError, EngineDeadError, SieveError
from serving.images import ImageDecoder
from serving.posts import Post, Posts, read_posts
from serving.senders import EngineSender, Fields, HttpSender, Response, Sender
from serving.settings import Settings
from serving.summary import Result, Summary, Tally

Send = Callable[[Post], Awaitable[Response]]
Write = Callable[[Result], None]


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What `python -m serving label` was asked for.

    Raises:
        ConfigError: a value is not allowed.
    """

    data: Path
    server: str | None = None
    model: str | None = None
    retention: float | None = None
    selector: str | None = None
    label_structure: str | None = None
    out: Path | None = None
    limit: int | None = None
    split: str | None = None
    concurrency: int = 16
    summary_json: Path | None = None

    def __post_init__(self) -> None:
        for name in ("concurrency", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be 1 or more", param=name)
        if self.retention is not None and not 0 < self.retention <= 1:
            raise ConfigError(
                f"retention={self.retention} must be above 0 and up to 1", param="retention"
            )
        self._check_output()

    def _check_output(self) -> None:
        output = self.output
        if output is None:
            return
        if output.suffix.lower() not in WRITERS:
            raise ConfigError(
                f"out={str(output)!r}; allowed are {' and '.join(WRITERS)} files, or - for none",
                param="out",
            )
        if output.resolve() == self.data.resolve():
            raise ConfigError(f"out={str(output)!r} is the data itself", param="out")

    @property
    def output(self) -> Path | None:
        """The file for the labels, if any."""
        return None if self.out is None or str(self.out) == "-" else self.out

    @property
    def choices(self) -> Choices:
        """What every request asks for."""
        return Choices(
            model=self.model,
            label_structure=self.label_structure,
            retention_ratio=self.retention,
            selector=self.selector,
        )


async def run_label(options: LabelOptions, settings: Settings | None) -> int:
    """Labels posts through a server, or with an engine of its own, and prints the summary.

    Args:
        options: what to label, and how.
        settings: of the engine in this process; unused where `options.server` is given.

    Returns:
        0 when all posts were labelled, 3 where some failed.

    Raises:
        SieveError: the run cannot start or go on.
    """
    posts = read_posts(options.data, split=options.split)
    async with _running_sender(options, settings) as sender:
        fields = await sender.fields()
        with _writer(options.output, fields) as write, _progress(options, posts) as advance:

            def on_result(result: Result) -> None:
                write(result)
                advance(result)

            summary = await label_posts(
                itertools.islice(posts, options.limit),
                sender,
                concurrency=options.concurrency,
                on_result=on_result,
            )
    summary = replace(summary, num_not_utf8=posts.num_not_utf8)
    print(summary)
    if options.summary_json is not None:
        with _create(options.summary_json) as file:
            json.dump(summary.as_dict(), file, indent=2, ensure_ascii=False)
    return 3 if summary.failed else 0


async def label_posts(
    posts: Iterable[Post],
    send: Send,
    *,
    concurrency: int,
    on_result: Callable[[Result], None],
) -> Summary:
    """Labels posts, `concurrency` at a time; memory holds twice as many at most.

    Args:
        posts: read as there is room for them.
        send: answers one post, or raises `SieveError`, which becomes that post's result.
        concurrency: most calls of `send` at once.
        on_result: called with every result, in the order of the posts.

    Raises:
        ConfigError: posts cannot be read, or no post can be sent any more.
        EngineDeadError: the engine in this process is gone.
    """
    gate = asyncio.Semaphore(concurrency)
    tally = Tally()
    pending: deque[asyncio.Task[Result]] = deque()

    async def attempt(post: Post) -> Result:
        async with gate:
            return await _attempt(post, send)

    async def finish(most: int) -> None:
        """Passes results on while the first is there, and until at most that many are pending."""
        while pending and (pending[0].done() or len(pending) > most):
            result = await pending.popleft()
            tally.add(result)
            on_result(result)

    try:
        for post in posts:
            pending.append(asyncio.create_task(attempt(post)))
            await finish(2 * concurrency - 1)
        await finish(0)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return tally.summary()


async def _attempt(post: Post, send: Send) -> Result:
    try:
        if not post.text and not post.images:
            raise BadRequestError("the post has neither text nor image", code="empty_post")
        return Result(post=post, response=await send(post))
    except (ConfigError, EngineDeadError):
        raise
    except SieveError as error:
        return Result(post=post, error=error)


@asynccontextmanager
async def _running_sender(
    options: LabelOptions, settings: Settings | None
) -> AsyncIterator[Sender]:
    if options.server is not None:
        client = HttpSender(options.server, options.choices, concurrency=options.concurrency)
        async with aclosing(client):
            yield client
        return
    from serving.app import image_limits
    from serving.server import running_labeler

    assert settings is not None, "without a server the engine runs here and needs settings"
    decoder = ImageDecoder(image_limits(settings))
    try:
        async with running_labeler(settings, _report) as labeler:
            yield EngineSender(
                labeler, decoder, options.choices, max_text_chars=settings.max_text_chars
            )
    finally:
        decoder.close()


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress(options: LabelOptions, posts: Posts) -> Iterator[Write]:
    """A bar on the terminal, if there is one, with rate and errors."""
    totals = [total for total in (posts.num_posts, options.limit) if total is not None]
    num_errors = 0
    with tqdm(
        total=min(totals, default=None),
        unit="post",
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
    ) as bar:

        def advance(result: Result) -> None:
            nonlocal num_errors
            num_errors += result.error is not None
            bar.set_postfix(errors=num_errors, refresh=False)
            bar.update()

        yield advance


@contextmanager
def _writer(output: Path | None, fields: Fields) -> Iterator[Write]:
    """Writes results to the output file, if there is one."""
    if output is None:
        yield lambda result: None
        return
    with _create(output) as file:
        yield WRITERS[output.suffix.lower()](file, fields)


def _create(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files need not be Unicode; what is not gets written as an escape.
        return path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def _jsonl_writer(file: IO[str], fields: Fields) -> Write:
    """Full answers, an object a line."""
    kept = ("labels", "probabilities", "model", "retention", "usage")

    def write(result: Result) -> None:
        row: dict[str, object] = {"id": result.post.id}
        if result.response is not None:
            row |= {name: result.response.get(name) for name in kept}
        if result.error is not None:
            row |= result.error.body()
        file.write(json.dumps(row, ensure_ascii=False) + "\n")

    return write


def _csv_writer(file: IO[str], fields: Fields) -> Write:
    """Labels and probabilities, a column each: `sentiment`, `sentiment.positive`, ..."""
    rows = csv.writer(file)
    columns = [(name, label) for name, labels in fields.items() for label in labels]
    rows.writerow(["id", *fields, *(".".join(column) for column in columns), "error"])

    def write(result: Result) -> None:
        answer = result.response or {"labels": {}, "probabilities": {}}
        labels = [answer["labels"].get(name, "") for name in fields]
        shares = [answer["probabilities"].get(name, {}).get(label, "") for name, label in columns]
        error = result.error.message if result.error is not None else ""
        rows.writerow([result.post.id, *labels, *shares, error])

    return write


WRITERS: dict[str, Callable[[IO[str], Fields], Write]] = {
    ".jsonl": _jsonl_writer,
    ".csv": _csv_writer,
}

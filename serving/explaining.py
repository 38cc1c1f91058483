"""`python -m serving explain`: what a request keeps of an image, as a picture."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from patches.config import Retention
from serving.app import image_limits
from serving.catalogue import Choices
from serving.errors import ConfigError, SieveError
from serving.images import ImageDecoder, ImageLimits
from serving.overlay import Tile, contact_sheet, draw_overlay
from serving.posts import IMAGE_SUFFIXES, Post
from serving.schema import LabelResponse
from serving.senders import EngineSender, HttpSender, Sender
from serving.settings import Settings

MOST_TILES = 400
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_EPILOG = """\
Without --server the engine runs here (about a minute). The picture is the page's: kept patches lit,
the rest dimmed; --heat lays the [CLS] attention over it. A folder, or several ratios, give a sheet.
A server with keys gets that of the environment variable SIEVE_API_KEY.

examples:
  python -m serving explain photo.jpg --retention 0.4 --out overlay.png
  python -m serving explain photo.jpg --retention 1,0.6,0.4,0.2,0.05 --heat 0.5
  python -m serving explain posts/ --server http://127.0.0.1:8000 --model llavac --out sheet.png
"""


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """What `python -m serving explain` was asked for.

    Attributes:
        image: a file, or a folder of them.
        out: the picture to write.
        retentions: one picture an image each; None is what the adapter or the server says.
        choices: of every request, but for the ratio.
        text: of every post.
        server: URL of a running server; None runs the engine here.
        heat: how strong the attention map is, 0 to 1.

    Raises:
        ConfigError: a value is not allowed.
    """

    image: Path
    choices: Choices
    out: Path = Path("overlay.png")
    retentions: Sequence[float | None] = (None,)
    text: str = ""
    server: str | None = None
    heat: float = 0.0

    def __post_init__(self) -> None:
        if not self.image.exists():
            raise ConfigError(f"image={str(self.image)!r} does not exist", param="image")
        if self.out.suffix.lower() not in _SUFFIXES:
            raise ConfigError(
                f"out={str(self.out)!r}; allowed are {', '.join(_SUFFIXES)} files", param="out"
            )
        if not self.out.resolve().parent.is_dir():
            raise ConfigError(f"out={str(self.out)!r}: its folder does not exist", param="out")
        if self.out.resolve() == self.image.resolve():
            raise ConfigError(f"out={str(self.out)!r} is the image itself", param="out")
        if not 0 <= self.heat <= 1:
            raise ConfigError(f"heat={self.heat} is not allowed: 0 to 1, e.g. 0.5", param="heat")

    @property
    def paths(self) -> list[Path]:
        """The images, in order of their names.

        Raises:
            ConfigError: a folder has none, or more than a sheet holds.
        """
        if self.image.is_file():
            return [self.image]
        found = sorted(p for p in self.image.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        most = MOST_TILES // len(self.retentions)
        if not 0 < len(found) <= most:
            raise ConfigError(
                f"image={str(self.image)!r} has {len(found)} images; a sheet holds 1 to {most}",
                param="image",
            )
        return found

    @property
    def is_sheet(self) -> bool:
        """Whether there is more than one picture to show."""
        return self.image.is_dir() or len(self.retentions) > 1


def read_retentions(text: str) -> list[float]:
    """Ratios between commas.

    Raises:
        ConfigError: one is not a number above 0 and up to 1.
    """
    try:
        return [Retention(ratio=float(part)).ratio for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"retention={text!r} is not allowed: numbers above 0 and up to 1 between commas, "
            "e.g. 0.4 or 1,0.4,0.2",
            param="retention",
        ) from error


async def run_explain(options: ExplainOptions, settings: Settings) -> int:
    """Writes the picture.

    Args:
        options: what was asked for.
        settings: of the engine, where it runs here; its limits on images hold in any case.

    Returns:
        0, or 3 where some images of a folder could not be explained.

    Raises:
        SieveError: the image cannot be explained, or none of the folder's.
    """
    limits, paths = image_limits(settings), options.paths
    tiles, failures = [], []
    async with _senders(options, settings, limits) as senders:
        for path, sender in itertools.product(paths, senders):
            try:
                tiles.append(await _tile(path, sender, options, limits))
            except ConfigError:
                raise
            except SieveError as error:
                failures.append(error)
                print(f"{path.name}: {error.message}", file=sys.stderr)
    if not tiles:
        raise failures[0]
    columns = len(options.retentions) if len(options.retentions) > 1 else _columns(len(tiles))
    sheet = contact_sheet(tiles, columns) if options.is_sheet else tiles[0].picture
    await asyncio.to_thread(sheet.save, options.out)
    for tile in tiles:
        print(" | ".join(tile.lines))
    print(f"wrote {options.out} ({sheet.width} x {sheet.height})")
    return 3 if failures else 0


def _columns(count: int) -> int:
    """A sheet a bit wider than high."""
    return min(count, max(1, round((1.4 * count) ** 0.5)))


@asynccontextmanager
async def _senders(
    options: ExplainOptions, settings: Settings, limits: ImageLimits
) -> AsyncIterator[list[Sender]]:
    """One sender a ratio."""
    wanted = [replace(options.choices, retention_ratio=ratio) for ratio in options.retentions]
    async with AsyncExitStack() as stack:
        if options.server is not None:
            through = [HttpSender(options.server, one, explain=True) for one in wanted]
            for sender in through:
                stack.push_async_callback(sender.aclose)
            await through[0].fields()  # whether there is a server
            yield list(through)
            return
        from serving.server import running_labeler

        report: Callable[[str], None] = lambda line: print(line, file=sys.stderr)  # noqa: E731
        labeler = await stack.enter_async_context(running_labeler(settings, report))
        decoder, most = ImageDecoder(limits), settings.max_text_chars
        yield [
            EngineSender(labeler, decoder, one, max_text_chars=most, explain=True) for one in wanted
        ]


async def _tile(path: Path, sender: Sender, options: ExplainOptions, limits: ImageLimits) -> Tile:
    answer = LabelResponse.model_validate(
        await sender(Post(id=path.name, text=options.text, images=(path,)))
    )
    if not answer.explanations:
        raise ConfigError(f"server={options.server!r} does not explain; it is an older one")
    raw = await asyncio.to_thread(path.read_bytes)
    (image,) = await ImageDecoder(limits, num_threads=1).decode([raw])
    picture = draw_overlay(image, answer.explanations[0], heat=options.heat)
    kept = answer.retention
    return Tile(
        picture=picture,
        lines=[
            path.name,
            f"{kept.kept} of {kept.patches} kept by {kept.selector}",
            *_labels(answer),
        ],
    )


def _labels(answer: LabelResponse) -> Iterable[str]:
    for field, label in answer.labels.items():
        yield f"{field} {label} {answer.probabilities[field][label]:.0%}"


def explain_command(argv: list[str]) -> Callable[[], Coroutine[None, None, int]]:
    """The command's arguments, read.

    Raises:
        ConfigError: one is not allowed.
    """
    from serving.cli import ENGINE_FIELDS, add_settings, read_settings

    parser = argparse.ArgumentParser(
        prog="python -m serving explain",
        description="Show which patches of an image a request keeps.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="an image, or a folder of them")
    add("--retention", metavar="R[,R...]", help="share of visual tokens kept; several give a sheet")
    add("--selector", help="which patches are kept")
    add("--model", help="adapter, or the base model; by default the server's base model")
    add("--label-structure", help="structure; by default the adapter's")
    add("--text", default="", help="the post's text")
    add("--heat", type=float, default=0.0, help="attention map over the image, 0 to 1 (default 0)")
    add("--out", type=Path, default=Path("overlay.png"), help="picture (default overlay.png)")
    add("--server", help="URL of a running server; without it the engine runs here")
    add("--checkpoint", help="without --server: checkpoint to load (default the demo)")
    engine_flags = ("config", *ENGINE_FIELDS)
    add_settings(parser, {name: Settings.model_fields[name] for name in ENGINE_FIELDS})
    given = vars(parser.parse_args(argv))
    engine = {name: given.pop(name) for name in engine_flags}
    settings = read_settings({**engine, "model": given.pop("checkpoint")})
    retention = given.pop("retention")
    choices = Choices(
        **{name: given.pop(name) for name in ("model", "selector", "label_structure")}
    )
    options = ExplainOptions(
        **given,
        choices=choices,
        retentions=(None,) if retention is None else read_retentions(retention),
    )
    return lambda: run_explain(options, settings)

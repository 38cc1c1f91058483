"""Builds a small LLaVA from nothing on the posts it is given: tokenizer, teachers, tower, language.

Each stage leaves a folder in `OUT/.build` when it is done; a build that was stopped goes on after
the last of them (within the tower, after the last saved step). Nothing appears in `OUT` itself
before everything is done.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from serving.errors import ConfigError
from serving.manifest import ImageMode
from serving.posts import Post
from train.demo.checkpoint import new_model, save_checkpoint, save_preprocessor
from train.demo.tokenizer import learn_tokenizer, save_tokenizer
from train.files import write_json
from train.scratch.chats import Examiner, tokenizer_corpus
from train.scratch.corpus import Corpus, describe_posts, read_corpus
from train.scratch.language import train_language
from train.scratch.pieces import embed_pieces
from train.scratch.settings import SIZES, Size
from train.scratch.teacher import Lessons, load_lessons, save_lessons, teach
from train.scratch.tower import look, train_tower

REPORT_NAME = "base.json"
VERSION = 1  # raise it when a recipe changes: half-built checkpoints of another one are refused
NOTES = (
    "trained from nothing on the posts counted here alone; no pretrained weights",
    "learned from linear teachers on TF-IDF and image descriptors, fitted out of fold on the same "
    "posts (knowledge distillation), and from the texts themselves",
)


@dataclass(frozen=True, kw_only=True)
class Build:
    """A build in a folder.

    Attributes:
        posts: to learn from.
        out: where the finished checkpoint goes.
        size: one of `SIZES`.
        image_mode: how pictures become squares.
        seed: of folds, weights and batches.
        source: what to call the posts.
    """

    posts: Sequence[Post]
    out: Path
    size: str
    image_mode: ImageMode
    seed: int
    source: str

    @property
    def work(self) -> Path:
        """Unfinished work."""
        return self.out / ".build"

    @cached_property
    def recipe(self) -> Size:
        """Sizes and lengths of training."""
        return SIZES[self.size]()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What two builds must share to be the same."""
        return {
            "version": VERSION,
            "size": self.size,
            "recipe": asdict(self.recipe),
            "image_mode": self.image_mode,
            "seed": self.seed,
            "source": self.source,
            **describe_posts(self.posts),
        }

    @cached_property
    def corpus(self) -> Corpus:
        """The posts in memory; every process reads them anew."""
        folder = self.work / "processor"
        folder.mkdir(exist_ok=True)
        save_preprocessor(folder, self.recipe.shape.image_size, self.image_mode)
        return read_corpus(self.posts, folder)

    def run(self) -> dict[str, Any]:
        """Builds what is missing and returns the report."""
        self._open()
        for name, stage in self._stages().items():
            if (self.work / name).exists():
                continue
            start, partial = time.perf_counter(), self.work / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            figures = stage(partial)
            seconds = round(time.perf_counter() - start, 1)
            write_json(partial / "stage.json", {"seconds": seconds, "figures": figures})
            partial.rename(self.work / name)
        report = self._report()
        self._publish(report)
        return report

    def _stages(self) -> dict[str, Callable[[Path], dict[str, Any]]]:
        return {
            "tokenizer": self._make_tokenizer,
            "teachers": self._make_teachers,
            "tower": self._make_tower,
            "reading": self._make_reading,
            "language": self._make_language,
        }

    def _open(self) -> None:
        """Starts or resumes the work folder.

        Raises:
            ConfigError: it belongs to a build with other settings, or cannot be written.
        """
        path = self.work / "settings.json"
        if path.exists():
            check_same(json.loads(path.read_text(encoding="utf-8")), self.settings, self.out)
        write_json(path, self.settings)

    def _make_tokenizer(self, folder: Path) -> dict[str, Any]:
        tokenizer = learn_tokenizer(tokenizer_corpus(self.corpus), self.recipe.max_vocab_size)
        save_tokenizer(tokenizer, folder)
        return {"vocab_size": len(tokenizer)}

    def _make_teachers(self, folder: Path) -> dict[str, Any]:
        lessons = teach(self.corpus, self.recipe, self.seed)
        save_lessons(lessons, folder / "lessons.npz")
        return {"out_of_fold": lessons.figures}

    def _make_tower(self, folder: Path) -> dict[str, Any]:
        lessons = self._lessons
        llava = new_model(self._tokenizer, self.seed, self.recipe.shape)
        has_image = torch.from_numpy(self.corpus.has_image)
        pixels = torch.from_numpy(self.corpus.pixels)[has_image]
        targets = torch.from_numpy(lessons.sights)[has_image]
        state = self.work / "tower-state.pt"
        tower, loss = train_tower(
            pixels, targets, self.recipe.shape, self.recipe.tower, self.seed, state
        )
        llava.model.vision_tower.load_state_dict(tower.state_dict())
        self._save(llava, folder)
        state.unlink(missing_ok=True)
        return {"loss": loss}

    def _make_reading(self, folder: Path) -> dict[str, Any]:
        """The language model learns texts, from rows that counts have given it."""
        llava, lessons = self._load("tower"), self._lessons
        rows = embed_pieces(
            self.corpus, lessons.said, self._tokenizer, self.recipe.shape.text_width, self.seed
        )
        table = llava.get_input_embeddings().weight.data
        table[list(rows)] = torch.from_numpy(np.stack(list(rows.values())))
        blind = replace(self.corpus, has_image=np.zeros_like(self.corpus.has_image))
        recipe = self.recipe.reading
        examiner = Examiner(blind, lessons, self._tokenizer, recipe)
        no_sight = torch.zeros(0, self.recipe.shape.num_patches, self.recipe.shape.tower_width)
        figures = train_language(llava, examiner, [no_sight], recipe, self.seed)
        self._save(llava, folder)
        return figures

    def _make_language(self, folder: Path) -> dict[str, Any]:
        llava, pixels = self._load("reading"), torch.from_numpy(self.corpus.pixels)
        tower = llava.model.vision_tower
        generator = torch.Generator().manual_seed(self.seed)
        sights = [look(tower, pixels, None), look(tower, pixels, generator)]
        recipe = self.recipe.language
        examiner = Examiner(self.corpus, self._lessons, self._tokenizer, recipe)
        figures = train_language(llava, examiner, sights, recipe, self.seed + 1)
        self._save(llava, folder)
        return figures

    def _load(self, stage: str) -> Any:
        return LlavaForConditionalGeneration.from_pretrained(
            self.work / stage,
            attn_implementation="eager",  # faster than sdpa to train on a CPU
        )

    @cached_property
    def _lessons(self) -> Lessons:
        return load_lessons(self.work / "teachers" / "lessons.npz")

    @property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.work / "tokenizer")

    def _save(self, llava: Any, folder: Path) -> None:
        save_checkpoint(llava, self._tokenizer, folder, self.image_mode)

    def _report(self) -> dict[str, Any]:
        stages = {
            name: json.loads((self.work / name / "stage.json").read_text(encoding="utf-8"))
            for name in self._stages()
        }
        seconds = {name: stage["seconds"] for name, stage in stages.items()}
        return {
            "finished": True,
            "settings": self.settings,
            "labels": _count_labels(self.posts),
            "figures": {name: stage["figures"] for name, stage in stages.items()},
            "seconds": {**seconds, "all": round(sum(seconds.values()), 1)},
            "threads": torch.get_num_threads(),
            "notes": list(NOTES),
        }

    def _publish(self, report: dict[str, Any]) -> None:
        """Moves the checkpoint's files into `out`; the report comes last and says it is whole."""
        for path in sorted((self.work / "language").iterdir()):
            if path.name != "stage.json":
                path.replace(self.out / path.name)
        write_json(self.out / REPORT_NAME, report)
        shutil.rmtree(self.work)


def build_base(
    posts: Sequence[Post],
    out: Path,
    *,
    size: str,
    image_mode: ImageMode,
    seed: int,
    source: str,
    fresh: bool,
) -> dict[str, Any]:
    """The report of a finished base in `out`, built unless it is there already.

    Raises:
        ConfigError: `out` has a base, finished or not, with other settings; or the posts are too
            few, have no labels, or an image that does not open.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    build = Build(posts=posts, out=out, size=size, image_mode=image_mode, seed=seed, source=source)
    report = out / REPORT_NAME
    if fresh:
        shutil.rmtree(build.work, ignore_errors=True)
        report.unlink(missing_ok=True)
    if report.exists() and not build.work.exists():
        done: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        check_same(done["settings"], build.settings, out)
        return done
    return build.run()


def check_same(there: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    """Raises `ConfigError` where a folder belongs to other settings; names those that differ."""
    asked = json.loads(json.dumps(asked))
    differing = [name for name in asked if there.get(name) != asked[name]]
    if differing:
        shown = "; ".join(
            f"{name}: {there.get(name)!r:.60} there, {asked[name]!r:.60} asked"
            for name in differing
        )
        raise ConfigError(
            f"{out} holds a base of other settings ({shown}); name another folder, or add --fresh "
            "to throw it away",
            param="out",
        )


def _count_labels(posts: Sequence[Post]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for post in posts:
        for field, label in post.labels.items():
            of_field = counts.setdefault(field, {})
            of_field[label] = of_field.get(label, 0) + 1
    return counts

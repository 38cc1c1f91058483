"""Builds the demo from nothing: tokenizer, tower, base model, adapters, figures.

Each stage leaves a file or folder in `OUT/.build` when it is done; a build that was stopped
goes on after the last of them (within the tower, after the last saved step). Nothing that is
already in `OUT` is touched before everything is done.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm, trange
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from serving.errors import ConfigError
from serving.structures import SENTIMENTS, STRUCTURES
from train.demo.augment import augment
from train.demo.checkpoint import new_model, save_checkpoint
from train.demo.dataset import normalize, stack_pixels, synthesize
from train.demo.decoder import BASE_RECIPE, freeze_tower, train_answers
from train.demo.examples import Album, chat_source
from train.demo.lora import ADAPTERS, train_adapter
from train.demo.quality import measure_demo, write_manifests
from train.demo.tokenizer import save_tokenizer, train_tokenizer
from train.demo.tower import Pictures, TowerRecipe, train_tower

SHIPPED = Path(__file__).parents[2] / "serving" / "demo"
REPORT_NAME = "report.json"
PRODUCTS = ("base", "adapters", REPORT_NAME)
VERSION = 1  # raise it when a recipe changes: half-built demos of another version are refused
NUM_PICTURES = 10_000


@dataclass(frozen=True, kw_only=True)
class Build:
    """A build in a folder.

    Attributes:
        out: where the finished demo goes.
        seed: of data, weights and batches.
    """

    out: Path
    seed: int

    @property
    def work(self) -> Path:
        """Unfinished work."""
        return self.out / ".build"

    @property
    def settings(self) -> dict[str, int]:
        """What two builds must share to be the same."""
        return {"version": VERSION, "seed": self.seed}

    @cached_property
    def pictures(self) -> Pictures:
        """All training images; every process draws them anew."""
        posts = synthesize(NUM_PICTURES, split="train", balanced=False, seed=self.seed)
        drawn = list(tqdm(posts, total=NUM_PICTURES, desc="pictures"))
        labels = [SENTIMENTS.index(post.labels["image"]) for post in drawn]
        return Pictures(
            pixels=stack_pixels(drawn),
            masks=torch.from_numpy(np.stack([post.mask for post in drawn])),
            labels=torch.tensor(labels),
        )

    @cached_property
    def album(self) -> Album:
        """Images as the finished tower sees them."""
        pictures = self.pictures
        tower = self._load_base("tower").model.vision_tower
        generator = torch.Generator().manual_seed(self.seed)
        parts = []
        with torch.no_grad():
            for start in trange(0, len(pictures.labels), 250, desc="features"):
                batch = slice(start, start + 250)
                pixels, _ = augment(pictures.pixels[batch], pictures.masks[batch], generator)
                output = tower(normalize(pixels), output_hidden_states=True)
                parts.append(output.hidden_states[-2][:, 1:].bfloat16())
        return Album(features=torch.cat(parts), labels=pictures.labels)

    def run(self) -> dict[str, Any]:
        """Builds what is missing and returns the report."""
        self._open()
        seconds: dict[str, float] = {}
        for name, stage in self._stages().items():
            if (self.work / name).exists():
                continue
            start, partial = time.perf_counter(), self.work / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            stage(partial)
            seconds[name] = round(time.perf_counter() - start, 1)
            partial.rename(self.work / name)
        report = self._report(seconds)
        self._publish()
        return report

    def _stages(self) -> dict[str, Callable[[Path], None]]:
        adapters = {f"adapters/{name}": self._adapter_stage(name) for name in ADAPTERS}
        return {
            "tokenizer": self._make_tokenizer,
            "tower": self._make_tower,
            "base": self._make_base,
            **adapters,
        }

    def _open(self) -> None:
        """Starts or resumes the work folder.

        Raises:
            ConfigError: it belongs to a build with other settings.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / "settings.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != self.settings:
            raise ConfigError(
                f"{self.work} holds an unfinished build with other settings than "
                f"{self.settings}; add --fresh to throw it away",
                param="fresh",
            )
        path.write_text(json.dumps(self.settings), encoding="utf-8")

    def _make_tokenizer(self, folder: Path) -> None:
        save_tokenizer(train_tokenizer(self.seed), folder)

    def _make_tower(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.work / "tokenizer")
        llava = new_model(tokenizer, self.seed)
        state, seen = self.work / "tower-state.pt", self.pictures
        tower = train_tower(seen, tokenizer, TowerRecipe(), self.seed, state)
        llava.model.vision_tower.load_state_dict(tower.state_dict())
        save_checkpoint(llava, tokenizer, folder)
        state.unlink(missing_ok=True)

    def _make_base(self, folder: Path) -> None:
        llava = self._load_base("tower")
        tokenizer = AutoTokenizer.from_pretrained(self.work / "tower")
        freeze_tower(llava)
        source = chat_source(tokenizer, self.album)
        train_answers(llava, self.album, source, BASE_RECIPE, seed=self.seed, name="base model")
        save_checkpoint(llava, tokenizer, folder)

    def _adapter_stage(self, name: str) -> Callable[[Path], None]:
        def stage(folder: Path) -> None:
            tokenizer = AutoTokenizer.from_pretrained(self.work / "base")
            train_adapter(
                self._load_base("base"),
                tokenizer,
                self.album,
                STRUCTURES[name],
                seed=self.seed,
                folder=folder,
            )

        return stage

    def _load_base(self, name: str) -> LlavaForConditionalGeneration:
        return LlavaForConditionalGeneration.from_pretrained(
            self.work / name, attn_implementation="eager"
        )

    def _report(self, seconds: dict[str, float]) -> dict[str, Any]:
        start = time.perf_counter()
        report = {**self.settings, **measure_demo(self.work, seed=self.seed)}
        seconds["evaluation"] = round(time.perf_counter() - start, 1)
        report["seconds"] = seconds  # of this run's stages
        write_manifests(self.work, report)
        text = json.dumps(report, indent=1) + "\n"
        (self.work / REPORT_NAME).write_text(text, encoding="utf-8")
        return report

    def _publish(self) -> None:
        for name in PRODUCTS:
            target = self.out / name
            if target.is_dir():
                shutil.rmtree(target)
            (self.work / name).replace(target)
        shutil.rmtree(self.work)


def build_demo(out: Path, *, seed: int, fresh: bool) -> dict[str, Any]:
    """The report of a finished demo in `out`, built unless it is there already.

    Raises:
        ConfigError: `out` has an unfinished build with other settings.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    build = Build(out=out, seed=seed)
    if fresh:
        shutil.rmtree(build.work, ignore_errors=True)
    elif (done := _finished(build)) is not None:
        return done
    return build.run()


def _finished(build: Build) -> dict[str, Any] | None:
    """The report of a demo that was built with the same settings before."""
    path = build.out / REPORT_NAME
    if build.work.exists() or not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    same = all(report.get(key) == value for key, value in build.settings.items())
    return report if same else None

"""A run folder and an evaluation as `train fit` and `train evaluate` leave them, made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from serving.manifest import fingerprint
from serving.settings import DEMO
from serving.structures import STRUCTURES


def make_run(folder: Path, **changes: object) -> Path:
    """A finished run whose adapter is the demo's `llavac`."""
    shutil.copytree(DEMO / "adapters" / "llavac", folder / "adapter")
    (folder / "adapter" / "sieve.json").unlink()
    record = {
        "finished": True,
        "recipe": "llavac",
        "label_structure": STRUCTURES["llavac"].model_dump(mode="json"),
        "base": str(DEMO / "base"),
        "base_fingerprint": fingerprint(DEMO / "base"),
        "image_mode": "crop",
        "seed": 3,
        "data": {
            "source": "posts",
            "splits": {"train": "train", "dev": "dev"},
            "train": {"posts": 2, "labels": {"image": {"positive": 1, "negative": 1}}},
            "dev": {"posts": 0, "labels": {}},
        },
        "settings": {"num_epochs": 2.0, "rank": 16},
        "num_steps": 10,
        "notes": ["by LoRA"],
        **changes,
    }
    (folder / "config.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps(record))
    return folder


CURVE = {1.0: 0.90, 0.8: 0.91, 0.4: 0.893, 0.2: 0.87, 0.05: 0.60}


def make_evaluation(folder: Path, run: Path, curve: dict = CURVE, **changes: object) -> Path:
    """An evaluation of the run's adapter with this macro-F1 by ratio."""
    cells = [
        {"selector": selector, "ratio": ratio, "fields": _fields(score - cost), "kept_share": 1.0}
        for selector, cost in (("cls", 0.0), ("random", 0.1))
        for ratio, score in curve.items()
    ]
    report = {
        "configuration": {
            "data": "posts",
            "split": "dev",
            "adapter_fingerprint": fingerprint(run / "adapter"),
            "prompt": STRUCTURES["llavac"].prompt,
        },
        "structure": "llavac",
        "num_posts": 450,
        "cells": cells,
        "baselines": {},
        "shuffled_images": {"lowers_the_score": True},
        "conclusions": ["Images count."],
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(report))
    return folder


def _fields(score: float) -> dict[str, dict[str, object]]:
    figures = {"macro_f1": score, "accuracy": score + 0.01, "weighted_f1": score, "ece": 0.1}
    return {
        "image": {**figures, "macro_f1": 0.1},
        "text": {**figures, "macro_f1": 0.2},
        "multimodal": {**figures, "confusion": [[1, 0], [0, 1]]},
    }

"""`python -m train fit` beside a plain Hugging Face script: posts/s, memory, loss.

Both train the same LoRA on the same model, posts, schedule, precision and threads, each run in a
process of its own. The model is built here with random weights: a tower of CLIP-L's width and
patch at 224 px (256 visual tokens; 8 of its 24 layers, so that a round takes a minute or two) and
a small Llama (4 layers of 512) with the published vocabulary of 32,064. The plain script is
`bench/plain_training.py`: `transformers.Trainer`, `peft`, `LlavaProcessor`, the model's own loss.
Posts are synthetic. Four clocks:

  loaded  everything after the model was loaded: features, training, saving (the headline)
  loop    `Trainer.train` alone; ours has the tower's features by then
  whole   the process, imports and model loading included
  cpu     processor seconds of the process, for machines that are not quiet

First both train in float32 on a few posts that fill one batch, where the order of posts plays no
part: their losses must agree step by step within 0.001, or nothing is measured. In the timed runs
a round's seed is the same for both; their orders of posts differ, and the loss curves are compared
with what another seed does to the plain script's own.

Goal: >= 1.3 times the plain script's posts/s after loading. Ten minutes on one quiet core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import permutation_test

from bench.fits import (
    OURS,
    STRUCTURE,
    THEIRS,
    Fit,
    Recipe,
    ended_by_sigterm,
    fit,
    write_checkpoint,
    write_posts,
)
from bench.flops import Shape
from bench.outcome import BenchError, Outcome, positive, progress
from bench.statistics import Sample, by_variant, interleaved, median, paired_ratio

GOAL = 1.3
CLOCKS = ("loaded", "loop", "whole", "cpu")
SIDES = (OURS, THEIRS)
CHECK_TOLERANCE = 1e-3
CHECK_BATCH, CHECK_STEPS = 8, 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    add = parser.add_argument
    add("--rounds", type=positive, default=5, help="timed rounds (default 5)")
    add("--posts", type=positive, default=64, help="posts of an epoch (default 64)")
    add("--epochs", type=positive, default=2, help="passes over them (default 2)")
    add("--batch-size", type=positive, default=8, help="posts of a step (default 8)")
    add("--micro-batch-size", type=positive, default=8, help="posts at once (default 8)")
    add("--rank", type=positive, default=16, help="of the LoRA (default 16)")
    add("--learning-rate", type=float, default=1e-3, help="highest rate (default 0.001)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default bfloat16")
    add("--threads", type=positive, default=1, help="threads of each training (default 1)")
    add("--image-size", type=positive, default=224, help="pixels (default 224)")
    add("--tower-layers", type=positive, default=8, help="layers of the tower (default 8)")
    add("--tower-width", type=positive, default=1024, help="its width (default CLIP-L's 1024)")
    add("--layers", type=positive, default=4, help="layers of the language model (default 4)")
    add("--width", type=positive, default=512, help="its width (default 512)")


def run(options: argparse.Namespace) -> Outcome:
    """Builds model and posts, checks that both train the same, and times them."""
    shape = shape_of(options)
    if options.rounds < 2:
        raise BenchError("--rounds starts at 2: one seed says nothing about noise")
    if options.batch_size % options.micro_batch_size:
        raise BenchError("--batch-size must be a multiple of --micro-batch-size")
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="sieve-training-") as name:
        folder = Path(name)
        progress("writing posts and the model ...")
        posts = write_posts(folder / "posts", options.posts, options.seed)
        few = write_posts(folder / "few", CHECK_BATCH, options.seed)
        base = folder / "base"
        text_tokens = write_checkpoint(base, shape, posts, options.seed)
        checked = check_losses(folder, base, few, options)
        fits = time_fits(folder, base, posts, options)
    return summarise(fits, checked, text_tokens, options)


def shape_of(options: argparse.Namespace) -> Shape:
    """The model's sizes.

    Raises:
        BenchError: no LLaVA has these.
    """
    if options.tower_layers < 2:
        raise BenchError("--tower-layers starts at 2: features come from the last but one")
    if options.tower_width % 64 or options.width % 64 or options.image_size % 14:
        raise BenchError("widths are multiples of a head's 64, --image-size of the patch's 14")
    return Shape(
        image_size=options.image_size,
        tower_layers=options.tower_layers,
        tower_width=options.tower_width,
        tower_mlp=4 * options.tower_width,
        tower_heads=options.tower_width // 64,
        layers=options.layers,
        width=options.width,
        mlp=options.width * 43 // 16,  # Llama-7B's 11008 for 4096
        heads=options.width // 64,
    )


def recipe_of(options: argparse.Namespace) -> dict[str, Any]:
    """What both train by; a field is named as in `python -m train fit --set`."""
    return {
        "rank": options.rank,
        "alpha": 2 * options.rank,
        "dropout": 0.0,
        "learning_rate": options.learning_rate,
        "schedule": "cosine",
        "warmup": 0.03,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "num_epochs": options.epochs,
        "batch_size": options.batch_size,
        "micro_batch_size": options.micro_batch_size,
        "dtype": options.dtype,
    }


def check_losses(
    folder: Path, base: Path, posts: Path, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Losses of both by step, where every step sees all posts.

    Raises:
        BenchError: they differ, so the two do not solve the same problem.
    """
    recipe = recipe_of(options) | {"dtype": "float32", "num_epochs": CHECK_STEPS}
    recipe |= {"batch_size": CHECK_BATCH, "micro_batch_size": CHECK_BATCH // 2}
    losses = {}
    for side in SIDES:
        found = _fit(side, recipe, base, posts, folder / f"check-{side}", options.seed, options)
        losses[side] = [found.losses[step] for step in sorted(found.losses)]
        progress(f"check {side:5} losses {' '.join(f'{loss:.4f}' for loss in losses[side])}")
    if largest_difference(losses) > CHECK_TOLERANCE:
        raise BenchError(f"losses on the same batches differ: {losses}; not the same training")
    return losses


def largest_difference(losses: Mapping[str, Sequence[float]]) -> float:
    """Of the two sides, over steps."""
    ours, theirs = (np.array(losses[side]) for side in SIDES)
    return float(np.abs(ours - theirs).max())


def time_fits(
    folder: Path, base: Path, posts: Path, options: argparse.Namespace
) -> dict[str, list[Fit]]:
    """Interleaved rounds; both of a round have the same seed."""
    fits: dict[str, list[Fit]] = {side: [] for side in SIDES}
    for index, side in interleaved(SIDES, options.rounds, options.seed):
        out, seed = folder / f"{side}-{index}", options.seed + index
        found = _fit(side, recipe_of(options), base, posts, out, seed, options)
        fits[side].append(found)
        progress(
            f"round {index + 1}/{options.rounds} {side:5} {found.loaded:7.1f} s after loading, "
            f"loop {found.loop:.1f} s, whole {found.whole:.1f} s, {found.peak / 2**30:.2f} GiB"
        )
    return fits


def _fit(
    side: str,
    recipe: Recipe,
    base: Path,
    posts: Path,
    out: Path,
    seed: int,
    options: argparse.Namespace,
) -> Fit:
    threads = options.threads
    return fit(side, recipe, base=base, posts=posts, out=out, seed=seed, num_threads=threads)


def summarise(
    fits: Mapping[str, Sequence[Fit]],
    checked: Mapping[str, Sequence[float]],
    text_tokens: int,
    options: argparse.Namespace,
) -> Outcome:
    """Rates by each clock, memory, and how far the loss curves are apart."""
    samples = [
        Sample(round=index, variant=f"{clock}/{side}", seconds=getattr(found, clock))
        for clock in CLOCKS
        for side in SIDES
        for index, found in enumerate(fits[side])
    ]
    seconds, num_posts = by_variant(samples), options.posts * options.epochs
    rows: list[list[object]] = []
    results: dict[str, object] = {}
    for clock in CLOCKS:
        ours, theirs = (seconds[f"{clock}/{side}"] for side in SIDES)
        ratio = paired_ratio(theirs, ours)
        rates = [num_posts / median(each) for each in (ours, theirs)]
        verdict = "" if clock != "loaded" else "yes" if ratio.median >= GOAL else "no"
        rows.append([f"posts/s, {clock}", *(f"{rate:.2f}" for rate in rates), ratio, verdict])
        results[clock] = {OURS: rates[0], THEIRS: rates[1], "ratio": vars(ratio)}
    peaks = [[found.peak / 2**30 for found in fits[side]] for side in SIDES]
    memory = paired_ratio(*peaks)
    rows.append(["peak memory, GiB", *(f"{median(peak):.2f}" for peak in peaks), memory, ""])
    results["peak_gib"] = dict(zip(SIDES, map(median, peaks), strict=True)) | {
        "ratio": vars(memory)
    }
    curves = compare_curves(fits)
    results |= {"curves": curves, "check": dict(checked)}
    results["fits"] = {side: [asdict(found) for found in fits[side]] for side in SIDES}
    return Outcome(
        title=f"Training: {options.posts} posts, {options.epochs} epochs, {options.dtype}, "
        f"{options.threads} thread(s), {options.rounds} rounds",
        headers=["", OURS, THEIRS, f"{OURS} / {THEIRS} [95 %]", f">= {GOAL}"],
        rows=rows,
        notes=[
            f"on the same batches in float32 the losses of {len(checked[OURS])} steps differ by at "
            f"most {largest_difference(checked):.4f}",
            describe_curves(curves),
            describe_shape(shape_of(options), text_tokens, options.epochs),
        ],
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        | {"structure": STRUCTURE, "text_tokens": text_tokens},
        results=results,
        samples=samples,
    )


def compare_curves(fits: Mapping[str, Sequence[Fit]]) -> dict[str, Any]:
    """Mean loss curves over seeds, at our steps, and their distances.

    `p` is how often curves dealt out to the two sides at random have means as far apart.
    """
    steps = sorted(fits[OURS][0].losses)
    ours = np.array([[found.losses[step] for step in steps] for found in fits[OURS]])
    theirs = np.array([_at_steps(found.losses, steps) for found in fits[THEIRS]])
    curves = np.concatenate([ours, theirs])

    def distance(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.abs(curves[first].mean(axis=0) - curves[second].mean(axis=0)).max())

    halves = np.split(np.arange(len(curves)), 2)
    dealt = permutation_test(halves, distance, vectorized=False, alternative="greater")
    return {
        "steps": steps,
        OURS: ours.mean(axis=0).round(4).tolist(),
        THEIRS: theirs.mean(axis=0).round(4).tolist(),
        "distance": float(dealt.statistic),
        "p": float(dealt.pvalue),
        "seeds": float(np.ptp(theirs, axis=0).max()),
    }


def _at_steps(losses: Mapping[int, float], steps: Sequence[int]) -> list[float]:
    """Means of the losses after each step's predecessor, as a log of these steps has them."""
    starts = [0, *steps[:-1]]
    return [
        float(np.mean([losses[step] for step in range(start + 1, end + 1)]))
        for start, end in zip(starts, steps, strict=True)
    ]


def describe_curves(curves: Mapping[str, Any]) -> str:
    """One line for people."""
    ends = [f"{curves[side][0]:.3f} to {curves[side][-1]:.3f} ({side})" for side in SIDES]
    verdict = "within" if curves["p"] >= 0.05 else "MORE THAN"
    return (
        f"mean loss curves, {' and '.join(ends)}, are at most {curves['distance']:.3f} apart, "
        f"{verdict} chance (permutation p = {curves['p']:.2f}); two seeds of {THEIRS} are up to "
        f"{curves['seeds']:.3f} apart"
    )


def describe_shape(shape: Shape, text_tokens: int, num_epochs: int) -> str:
    """What the FLOP of this shape, and of LLaVA-1.5-7B, would make of it."""
    here, full = (modelled_ratio(one, text_tokens, num_epochs) for one in (shape, Shape()))
    return (
        f"{shape.num_patches} visual and {text_tokens} text tokens a post; counting FLOP alone, "
        f"{here:.2f} times is what this shape allows, and {full:.2f} what LLaVA-1.5-7B would: "
        "there the language model's own passes are nearly everything"
    )


def modelled_ratio(shape: Shape, text_tokens: int, num_epochs: int) -> float:
    """FLOP of a post by the plain script over ours, without padding and the weights' gradients.

    The tower runs forward only, in every epoch or once; the rest forward and backward, with logits
    at every position or at an answer's six.
    """
    tokens = shape.num_patches + text_tokens
    one_logit = 2 * shape.width * shape.vocab_size
    rest = shape.prefill_flops(tokens) - one_logit + shape.projector_flops(shape.num_patches)
    plain = shape.tower_flops() + 2 * (rest + tokens * one_logit)
    ours = shape.tower_flops() / num_epochs + 2 * (rest + 6 * one_logit)
    return plain / ours

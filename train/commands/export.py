"""`python -m train export`."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path

from train.manifest import MARGIN

DESCRIPTION = """\
Make a trained adapter ready to serve: its weights, a manifest (label structure, prompt, image mode,
base and its fingerprint, data, figures, retention curve, recommended ratio) and probes, which
`python -m serving verify` asks in vLLM: the adapter must answer otherwise than its base, and give
the trained model's log-probabilities, or nothing is exported.

The recommended ratio is the smallest of the evaluation whose macro-F1 is within --margin of that at
ratio 1.0. There is none without --evaluation, or where other posts' images did as well.

examples:
  python -m train export runs/llavac --out adapters/llavac --evaluation runs/llavac/evaluation
  python -m train export runs/llavac --out adapters/llavac --merged checkpoints/llavac-merged
"""


def add_flags(parser: ArgumentParser) -> None:
    """Declares the flags."""
    add = parser.add_argument
    add("trained", type=Path, metavar="RUN", help="folder that `train fit` wrote, finished")
    add("--out", type=Path, required=True, help="the adapter's folder, named as the API shall")
    add("--evaluation", type=Path, help="folder that `train evaluate` wrote for RUN/adapter")
    add("--selector", default="cls", help="which patches requests keep (default: cls)")
    add(
        "--margin",
        type=float,
        default=MARGIN,
        help=f"macro-F1 that the recommended ratio may cost (default: {MARGIN})",
    )
    add("--base", type=Path, help="where the base is now (default: where it was in training)")
    add("--merged", type=Path, help="also write a whole checkpoint with the adapter in it")
    add(
        "--verify",
        action=BooleanOptionalAction,
        default=True,
        help="compare vLLM's answers with the trained model's (default: yes)",
    )
    add("--replace", action="store_true", help="--out and --merged may be there already")


def run(given: Namespace) -> int:
    """Exports."""
    from train.export import ExportOptions, export

    out = export(
        ExportOptions(
            run=given.trained,
            out=given.out,
            evaluation=given.evaluation,
            selector=given.selector,
            margin=given.margin,
            base=given.base,
            merged=given.merged,
            is_verified=given.verify,
            replace=given.replace,
        )
    )
    state = "verified in vLLM" if given.verify else "not verified"
    print(f"{out}: {state}; serve it with `python -m serving --adapters {out.parent} ...`")
    if given.merged is not None:
        print(f"{given.merged}: base and adapter in one checkpoint")
    return 0

"""`python -m train fold`."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from train.commands.fit import add_data_flags, material_of

DESCRIPTION = """\
Train the projector alone, LLaVA's first stage, and write it into a new base checkpoint.

An adapter cannot carry whole projector weights: vLLM refuses them. The new base has its own
fingerprint, so adapters of the old one are refused there; train them again on the new base. For a
light touch on the projector, `python -m train fit ... --set projector=lora` needs no new base.
"""


def add_flags(parser: ArgumentParser) -> None:
    """Declares the flags."""
    add = parser.add_argument
    add("--base", type=Path, required=True, help="LLaVA-1.5 checkpoint, a local folder")
    add_data_flags(parser)
    add("--out", type=Path, required=True, help="the new checkpoint's folder; OUT.run has the logs")
    add("--structure", default="llavac", help="label structure to train on (default: llavac)")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change the recipe 'projector'")
    add("--config", type=Path, help="the same from a YAML file")
    add("--cache", type=Path, help="keep the tower's features here, for other runs as well")
    add("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    add("--fresh", action="store_true", help="throw an unfinished run away and begin anew")


def run(given: Namespace) -> int:
    """Trains and writes the checkpoint."""
    import torch

    from serving.manifest import fingerprint
    from train.fold import fold
    from train.recipes import make_recipe

    torch.set_num_threads(given.threads)
    settings = [f"structure={given.structure}", *given.set]
    recipe = make_recipe("projector", file=given.config, settings=settings)
    structure, material = material_of(given, recipe.structure)
    out = fold(
        recipe,
        structure,
        material,
        base=given.base,
        out=given.out,
        cache=given.cache,
        fresh=given.fresh,
    )
    print(f"{out}: a new base, fingerprint {fingerprint(out)}")
    return 0

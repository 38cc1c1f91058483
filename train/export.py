"""From a finished run to an adapter folder that a server loads, checked in vLLM on the way.

All is written into a folder beside the target and put in place by one rename, after
`python -m serving verify` found that vLLM gives the trained model's log-probabilities.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from patches.selection import SELECTORS
from serving.errors import ConfigError
from serving.manifest import fingerprint, read_image_mode
from train.fit import is_full
from train.manifest import MARGIN, Run, make_manifest, read_evaluation, read_run
from train.merge import merge
from train.probes import make_probes

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `python -m train export` was asked for.

    Attributes:
        run: a finished run's folder.
        out: the adapter's folder; its name is the adapter's name in the API.
        evaluation: folder of an evaluation of the run's adapter.
        selector: which patches requests keep unless they ask for others.
        margin: most macro-F1 that the recommended ratio may cost.
        base: where the base checkpoint is now; by default where it was in training.
        merged: also write a whole checkpoint with the adapter in it, here.
        is_verified: whether vLLM has to give the trained model's answers.
        replace: whether `out` and `merged` may be there already.
    """

    run: Path
    out: Path
    evaluation: Path | None = None
    selector: str = "cls"
    margin: float = MARGIN
    base: Path | None = None
    merged: Path | None = None
    is_verified: bool = True
    replace: bool = False


def export(options: ExportOptions) -> Path:
    """Writes the adapter's folder, and returns it.

    Raises:
        ConfigError: the run is not finished, its base or evaluation is another one's, a folder
            is in the way or cannot be written, or vLLM does not serve the adapter as it was
            trained. Nothing is left at `out` then, or what was there before.
    """
    if options.selector not in SELECTORS:
        raise ConfigError(
            f"--selector {options.selector!r} is unknown; allowed are {', '.join(SELECTORS)}",
            param="selector",
        )
    if not 0 <= options.margin <= 1:
        raise ConfigError(
            f"--margin {options.margin:g} is outside [0, 1]; it is macro-F1, e.g. {MARGIN}",
            param="margin",
        )
    run, trained = read_run(options.run), options.run / "adapter"
    base = find_base(run, options.base)
    evaluated = None
    if options.evaluation is not None:
        evaluated = read_evaluation(options.evaluation, run, fingerprint(trained))
    manifest = make_manifest(
        run, trained, evaluated, selector=options.selector, margin=options.margin
    )
    for path, flag in ((options.out, "out"), (options.merged, "merged")):
        if path is not None:
            check_free(path, flag, replace=options.replace)
    with placed(options.out, "out") as folder:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(trained / name, folder / name)
        manifest.save(folder)
        make_probes(run.label_structure, base, folder).save(folder)
        if options.is_verified:
            verify(folder, base)
        if options.merged is not None:
            with placed(options.merged, "merged") as merged:
                merge(base, folder, merged)
    return options.out


def find_base(run: Run, now: Path | None) -> Path:
    """The checkpoint that the run was trained on.

    Raises:
        ConfigError: it is not there any more, or another one is.
    """
    base = now or run.base
    if run.base_fingerprint is None and not base.is_dir():
        return base  # a Hugging Face id
    _check_base(base, run)
    mode = read_image_mode(base)
    if mode != run.image_mode:
        raise ConfigError(
            f"--base {base} makes squares of images by {mode!r}, the run was trained with "
            f"{run.image_mode!r}; restore its preprocessor_config.json",
            param="base",
        )
    return base


def _check_base(base: Path, run: Run) -> None:
    if not base.is_dir():
        raise ConfigError(
            f"the run's base {base} is not there; say where it is with --base", param="base"
        )
    try:
        found = fingerprint(base)
    except FileNotFoundError as error:
        raise ConfigError(
            f"--base {base} has no *.safetensors; name the checkpoint that the run was trained on",
            param="base",
        ) from error
    if run.base_fingerprint not in (None, found):
        raise ConfigError(
            f"the adapter was trained on another base than {base}: its fingerprint is {found}, "
            f"the run's is {run.base_fingerprint}; name that checkpoint with --base",
            param="base",
        )


def verify(folder: Path, base: Path) -> None:
    """Asks vLLM, in a process of its own (training never imports the engine).

    Raises:
        ConfigError: vLLM does not serve the adapter as it was trained; says what it printed.
    """
    command = [sys.executable, "-m", "serving", "verify", str(folder), "--model", str(base)]
    paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    if done.returncode == 1 and done.stdout:
        raise ConfigError(
            f"vLLM does not serve the adapter as it was trained, so it is not exported:\n"
            f"{done.stdout.rstrip()}"
        )
    if done.returncode != 0:
        said = done.stderr.rstrip().splitlines()[-15:]
        raise ConfigError(
            "the adapter could not be verified, so it is not exported (--no-verify leaves that "
            "out):\n" + "\n".join(said)
        )


def check_free(path: Path, flag: str, *, replace: bool) -> None:
    """Refuses to overwrite.

    Raises:
        ConfigError: something is there, and it is not to be replaced.
    """
    if path.exists() and not replace:
        raise ConfigError(
            f"--{flag} {path} is there already; name a new folder, as a running server's prefix "
            "cache knows an adapter by its path, or add --replace",
            param=flag,
        )


@contextmanager
def placed(out: Path, flag: str) -> Iterator[Path]:
    """A new folder of the same name that takes `out`'s place when the block ends well.

    It lies one level deeper than adapters do, so no server finds it before it is whole.

    Raises:
        ConfigError: it cannot be written, or the disk is full; nothing is left.
    """
    workshop: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=".export-", dir=out.parent))
        folder = workshop / "new" / out.name
        folder.mkdir(parents=True)
        yield folder
        if out.exists():
            out.rename(workshop / "old")
        folder.rename(out)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None)
        if is_full(error):
            reason = "the disk is full; free some and export again"
        if reason is None:
            raise
        raise ConfigError(f"--{flag} {out} cannot be written: {reason}", param=flag) from error
    finally:
        if workshop is not None:
            shutil.rmtree(workshop, ignore_errors=True)

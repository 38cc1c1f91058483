"""How many LoRA parameters it takes."""

from __future__ import annotations

from typing import Any

from serving.errors import ConfigError
from train.recipes import change_recipe
from train.studies.cells import Cell
from train.studies.findings import ARM_HEADERS, Findings, Plot, Table, conclude_floor, point
from train.studies.setup import Setup
from train.studies.study import (
    Results,
    Study,
    ask_name,
    compare_arms,
    run_name,
    training_facts,
)

SERVED = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""`max_lora_rank` of vLLM is one of these; an adapter of another rank takes the next one's room."""


class RankStudy(Study):
    """An adapter a seed and rank; alpha is twice the rank, so updates are scaled alike."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._ranks = sorted(setup.options.ranks)
        if not all(1 <= rank <= 512 for rank in self._ranks):
            raise ConfigError(
                f"--ranks {self._ranks}: a rank lies between 1 and 512", param="ranks"
            )

    def facts(self) -> dict[str, Any]:
        """The ranks."""
        return {"ranks": self._ranks}

    def cells(self) -> list[Cell]:
        """The base, then seed by seed all ranks."""
        cells = [self.ask_cell("ask-base", None)]
        for seed in self.setup.seeds:
            for rank in self._ranks:
                recipe = change_recipe(self.setup.recipe, {"rank": rank, "alpha": 2 * rank})
                cells += [
                    self.train_cell(_arm(rank), seed, recipe),
                    self.ask_cell(ask_name(_arm(rank), seed), run_name(_arm(rank), seed)),
                ]
        return cells

    def find(self, results: Results) -> Findings:
        """Each rank against the highest."""
        *lower, highest = [_arm(rank) for rank in self._ranks]
        arms = {_arm(rank): self.over_seeds(results, _arm(rank)) for rank in self._ranks}
        beside = {"zero-shot base": self.marked(results["ask-base"]), "majority": self.majority()}
        figures, rows, lines = compare_arms(self, arms, beside, [(arm, highest) for arm in lower])
        costs = {arm: training_facts(results, arm, self.setup.seeds) for arm in arms}
        figures["costs"] = {
            arm: {"trainable_parameters": parameters, "seconds": seconds}
            for arm, (parameters, seconds) in costs.items()
        }
        none = (None, None)
        rows = [[*row, *costs.get(str(row[0]), none)] for row in rows]
        unserved = [rank for rank in self._ranks if rank not in SERVED]
        return Findings(
            question="An adapter a seed and LoRA rank; alpha is twice the rank and the learning "
            "rate the recipe's, so that updates are scaled alike.",
            tables=[
                Table(
                    title=f"{self.setup.field} by rank",
                    headers=[*ARM_HEADERS, "trainable parameters", "seconds"],
                    rows=rows,
                    legend="Seconds are of the steps alone, without loading and tower; of a "
                    "training that was stopped, from where it went on.",
                )
            ],
            conclusions=[
                *lines,
                *conclude_floor(figures["arms"], figures["beside"]["majority"]),
            ],
            limits=[
                "One learning rate for all ranks: a rank that looks worse may want another rate.",
                *([f"Served with the room of the next rank up: {unserved}."] if unserved else []),
            ],
            figures=figures,
            plots=[
                Plot(
                    name="rank",
                    across="LoRA rank",
                    up=f"macro-F1 of {self.setup.field}",
                    lines={
                        "adapters": [
                            point(rank, figures["arms"][_arm(rank)]) for rank in self._ranks
                        ]
                    },
                    levels={
                        name: one["macro_f1"]["mean"] for name, one in figures["beside"].items()
                    },
                    is_log=True,
                )
            ],
            num_comparisons=len(lower),
        )


def _arm(rank: int) -> str:
    return f"rank {rank}"


STUDY = RankStudy

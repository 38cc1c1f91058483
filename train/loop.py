"""The loop: Hugging Face's `Trainer`, told what batches, evaluations and checkpoints are here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from serving.posts import Post
from serving.structures import LabelStructure
from train.examples import Collator, Examples
from train.metrics import mark, measure
from train.model import Llava
from train.order import Order
from train.predict import predict
from train.recipes import Recipe
from train.sight import Sight
from train.student import Student

BEST_METRIC = "macro_f1"


class AnswerTrainer(Trainer):
    """Trains on answers; evaluates by answering the dev posts under the label constraint.

    Args:
        student: the module to train.
        model: the same, to answer with.
        structure: what is asked.
        examples: the training posts.
        dev: posts to evaluate on; may be empty.
        sight: all of their images.
        recipe: how.
        folder: where checkpoints and logs go.
    """

    def __init__(
        self,
        *,
        student: Student,
        model: Llava,
        structure: LabelStructure,
        examples: Examples,
        dev: Sequence[Post],
        sight: Sight,
        recipe: Recipe,
        folder: Path,
        is_cached: bool,
    ) -> None:
        self.control: TrainerControl
        self._llava, self._structure, self._sight = model, structure, sight
        self._recipe, self._dev = recipe, list(dev)
        collator = Collator(model, sight, recipe, is_cached=is_cached)
        arguments = make_arguments(recipe, folder, num_examples=len(examples), has_dev=bool(dev))
        self.order = Order(
            examples.lengths(collator.tokens_per_image),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            group_by_length=recipe.group_by_length,
            weights=examples.draw_weights() if recipe.balance == "sampling" else None,
        )
        super().__init__(
            model=student,
            args=arguments,
            train_dataset=examples,
            eval_dataset=self._dev or None,
            data_collator=collator,
            callbacks=[
                EpochOrder(self.order),
                RunLog(folder),
                StopAndSave(recipe.patience),
                TensorBoardCallback(SummaryWriter(folder / "tensorboard")),
            ],
        )
        self.remove_callback(PrinterCallback)
        if not sys.stderr.isatty():
            self.remove_callback(ProgressCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Accuracy and F1 of every field; the last field's count. All devices share the posts."""
        rank, world = self.args.process_index, self.args.world_size
        self._llava.llava.eval()
        mine = self._dev[rank::world]
        found = predict(
            self._llava,
            self._structure,
            mine,
            self._sight,
            ratio=self._recipe.retention_ratio,
            selector=self._recipe.selector,
        )
        pairs = gather_object(list(zip(mine, found, strict=True))) if world > 1 else None
        posts, answers = zip(*pairs, strict=True) if pairs else (mine, found)
        metrics: dict[str, float] = {}
        for name, marked in mark(self._structure, posts, answers).items():
            figures = measure(marked)
            for metric in ("accuracy", "macro_f1", "weighted_f1"):
                metrics[f"{metric_key_prefix}_{name}_{metric}"] = figures[metric]
                metrics[f"{metric_key_prefix}_{metric}"] = figures[metric]  # the last field stays
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def make_arguments(
    recipe: Recipe, folder: Path, *, num_examples: int, has_dev: bool
) -> TrainingArguments:
    """The recipe in Hugging Face's terms."""
    import torch

    on_gpu = torch.cuda.is_available()
    world = max(1, torch.cuda.device_count()) if on_gpu else 1
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        import os

        world = int(os.environ["WORLD_SIZE"])
    accumulation = max(1, recipe.batch_size // (recipe.micro_batch_size * world))
    per_epoch = max(1, -(-num_examples // recipe.batch_size))
    every = max(1, round(recipe.evaluate_every * per_epoch))
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=recipe.num_epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=not on_gpu,
        seed=recipe.seed,
        logging_steps=max(1, min(10, per_epoch // 5)),
        eval_strategy="steps" if has_dev else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=recipe.save_every or every,
        save_total_limit=2,
        metric_for_best_model=BEST_METRIC if has_dev else None,
        greater_is_better=True,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=on_gpu,
    )


class EpochOrder(TrainerCallback):
    """Tells the order which epoch begins, also after a resume in the middle of one."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """`state.epoch` is a fraction where a run goes on in the middle of an epoch."""
        self._order.epoch = int(state.epoch or 0)


class RunLog(TrainerCallback):
    """Every figure as a line of `log.jsonl`; what a killed run logged past its checkpoint goes."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "log.jsonl"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keeps the lines up to the step where training goes on."""
        if not state.is_world_process_zero or not self._path.exists():
            return
        whole = [line for line in self._path.read_text().splitlines() if line.endswith("}")]
        kept = [entry for entry in map(json.loads, whole) if entry["step"] <= state.global_step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Adds a line."""
        if not state.is_world_process_zero or not logs:
            return
        epoch = round(state.epoch or 0.0, 4)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "epoch": epoch, **logs}) + "\n")
        if "eval_accuracy" in logs and not sys.stderr.isatty():
            print(
                f"epoch {epoch:.2f}, step {state.global_step}: dev accuracy "
                f"{logs['eval_accuracy']:.3f}, macro-F1 {logs['eval_macro_f1']:.3f}",
                file=sys.stderr,
                flush=True,
            )


class StopAndSave(TrainerCallback):
    """A checkpoint at every evaluation; an end where the last `patience` brought nothing better."""

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Reads the history, which a resumed run has too."""
        control.should_save = True
        scores = [
            entry[f"eval_{BEST_METRIC}"]
            for entry in state.log_history
            if f"eval_{BEST_METRIC}" in entry
        ]
        best = scores.index(max(scores))
        if self._patience and len(scores) - 1 - best >= self._patience:
            control.should_training_stop = True


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill may leave a part of one."""
    found = sorted(
        (folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
    )
    for path in reversed(found):
        try:
            # The state is the last file of a checkpoint.
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
        except (OSError, ValueError):
            continue
    return None


def take_best(trainer: AnswerTrainer, student: Student) -> int:
    """Puts the weights of the best evaluation back; returns its step."""
    step = trainer.state.best_global_step
    if step is None or step == trainer.state.global_step:
        return trainer.state.global_step
    folder = Path(str(trainer.args.output_dir)) / f"checkpoint-{step}"
    student.load_state_dict(load_file(folder / "model.safetensors"))
    return int(step)

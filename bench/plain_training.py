"""The competitor of `bench training`: LoRA on a LLaVA as one writes it with Hugging Face alone.

`transformers.Trainer`, `peft`, `LlavaProcessor` and the model's own loss, as their documentation
shows them: images through the tower in every step, logits of all positions, -100 outside the
answers, the default sampler. Reads one JSON file of settings, so that it stands alone:

    python -m bench.plain_training settings.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from serving.posts import Post, read_posts
from serving.structures import STRUCTURES

LANGUAGE_MODEL = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
IGNORED = -100


class PlainSettings(BaseModel):
    """What `recipe` fields of the same names say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Path
    data: Path
    out: Path
    structure: str
    rank: int
    alpha: int
    dropout: float
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    max_grad_norm: float
    num_epochs: int
    batch_size: int
    micro_batch_size: int
    dtype: str
    seed: int
    threads: int


class Conversations(Dataset[tuple[str, str, Image.Image]]):
    """A post's prompt, answer and opened image."""

    def __init__(self, posts: Sequence[Post], processor: Any, structure: str) -> None:
        self._posts, self._processor = posts, processor
        self._structure = STRUCTURES[structure]

    def __len__(self) -> int:
        return len(self._posts)

    def __getitem__(self, index: int) -> tuple[str, str, Image.Image]:
        post = self._posts[index]
        turn = self._structure.prompt.replace("{text}", post.text)
        content = [{"type": "image"}, {"type": "text", "text": turn}]
        prompt = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        answer = " " + self._structure.render(dict(post.labels))
        (image,) = post.images
        assert isinstance(image, Path)
        return prompt, answer + self._processor.tokenizer.eos_token, Image.open(image)


class PadAndMask:
    """Texts and images to a batch; only the answers have labels."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, rows: Sequence[tuple[str, str, Image.Image]]) -> dict[str, Tensor]:
        """`pixel_values` of the images; `input_ids`, `attention_mask` and `labels` `(B, S)`."""
        prompts, answers, images = zip(*rows, strict=True)
        whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        batch = self._processor(
            images=list(images), text=whole, padding=True, padding_side="right", return_tensors="pt"
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        ends = batch["attention_mask"].sum(dim=1).tolist()
        for row, (prompt, text, end) in enumerate(zip(prompts, whole, ends, strict=True)):
            start = end - (self._count(text) - self._count(prompt))
            labels[row, start:end] = batch["input_ids"][row, start:end]
        return {**batch, "labels": labels}

    def _count(self, text: str) -> int:
        return len(self._processor.tokenizer(text)["input_ids"])


def train(settings: PlainSettings) -> dict[str, Any]:
    """Trains and saves; returns seconds by stage and the loss of every step."""
    torch.set_num_threads(settings.threads)
    posts = list(read_posts(settings.data))
    started = time.perf_counter()
    processor = AutoProcessor.from_pretrained(settings.base)
    model = LlavaForConditionalGeneration.from_pretrained(
        settings.base, dtype=getattr(torch, settings.dtype)
    )
    loaded = time.perf_counter()
    set_seed(settings.seed)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=LANGUAGE_MODEL,
        task_type="CAUSAL_LM",
    )
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=_arguments(settings, num_posts=len(posts)),
        train_dataset=Conversations(posts, processor, settings.structure),
        data_collator=PadAndMask(processor),
    )
    trainer.train()
    trained = time.perf_counter()
    trainer.save_model(str(settings.out / "adapter"))
    saved = time.perf_counter()
    seconds = {"loading": loaded - started, "training": trained - loaded, "saving": saved - trained}
    history = trainer.state.log_history
    (loop,) = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    return {
        "seconds_by_stage": seconds,
        "loop": loop,
        "losses": {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
    }


def _arguments(settings: PlainSettings, *, num_posts: int) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(settings.out / "checkpoints"),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        num_train_epochs=settings.num_epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.dtype == "bfloat16",
        use_cpu=not on_gpu,
        seed=settings.seed,
        logging_steps=1,
        save_steps=-(-num_posts // settings.batch_size),
        save_total_limit=2,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )


def main(path: Path) -> None:
    """Trains by the settings in a file; leaves `plain.json` in their `out`."""
    settings = PlainSettings.model_validate_json(path.read_text(encoding="utf-8"))
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "plain.json").write_text(json.dumps(train(settings)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

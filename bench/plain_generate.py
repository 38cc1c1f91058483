"""The competitor of `bench peers` that is Hugging Face alone: a script around `generate`.

As its documentation shows it: processor, model in the checkpoint's precision, adapter merged into
the weights, greedy decoding until the end token. Asked a line at a time by its parent (see
`bench.line_process`), so that the model is loaded once:

    python -m bench.plain_generate BASE [ADAPTER]
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from bench.line_process import replies, reply

MAX_NEW_TOKENS = 16


class PlainLabels:
    """A model and its processor.

    Args:
        base: checkpoint.
        adapter: LoRA folder; None for the base model.
    """

    def __init__(self, base: str, adapter: str | None) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        model: Any = LlavaForConditionalGeneration.from_pretrained(base, dtype="auto")
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().to(device)
        self._processor = AutoProcessor.from_pretrained(base)
        self._processor.tokenizer.padding_side = "left"

    def label(self, posts: Sequence[tuple[str, str]], batch_size: int) -> list[str]:
        """Answers of posts, each a user's turn and an image as a data URL."""
        found: list[str] = []
        for start in range(0, len(posts), batch_size):
            found += self._answers(posts[start : start + batch_size])
        return found

    @torch.inference_mode()
    def _answers(self, posts: Sequence[tuple[str, str]]) -> list[str]:
        inputs = self._processor(
            text=[self._prompt(turn) for turn, _ in posts],
            images=[decoded(url) for _, url in posts],
            return_tensors="pt",
            padding=True,
        ).to(self._model.device, self._model.dtype)
        ids = self._model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        answers = self._processor.batch_decode(new, skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def _prompt(self, turn: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": turn}]
        messages = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(messages, add_generation_prompt=True))


def decoded(url: str) -> Image.Image:
    """The image of a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))).convert("RGB")


def main(base: str, adapter: str | None) -> None:
    """Labels blocks of posts until stdin ends: their JSON in, seconds and labels out."""
    with replies() as stream:
        model = PlainLabels(base, adapter)
        reply(stream)
        for line in sys.stdin:
            asked = json.loads(line)
            started = time.perf_counter()
            labels = model.label(asked["posts"], asked["batch_size"])
            seconds = time.perf_counter() - started
            reply(stream, json.dumps({"seconds": seconds, "labels": labels}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)

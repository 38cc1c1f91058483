"""What an answer should be, said with Hugging Face only: the yardstick for the server.

Letters: N images, P patches, K kept, L tower layers, D tower width, E language model width,
S prompt length after the image tokens are expanded.

Slow and plain on purpose. It shares `patches.selection` with the server (the definition of what
is kept) and nothing else. All of it runs in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
)

from patches.selection import PatchView, num_kept, select


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One prompt's images and answer as the reference sees them.

    Attributes:
        kept: an image's kept patches, `(K,)` int64 ascending each.
        cls_attention: an image's `(L, P)` float32, see `patches.selection.PatchView`.
        logprobs: `(A, V)` log-probabilities of every token before each answer id.
    """

    kept: tuple[Tensor, ...]
    cls_attention: tuple[Tensor, ...]
    logprobs: Tensor

    def answer_logprobs(self, answer_ids: Sequence[int]) -> Tensor:
        """Log-probability of each given answer id, `(A,)`."""
        return self.logprobs.gather(1, torch.tensor(answer_ids)[:, None])[:, 0]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the tower makes of images.

    Attributes:
        features: `(N, P, D)` of the feature layer, without [CLS].
        cls_attention: `(N, L, P)` float32.
    """

    features: Tensor
    cls_attention: Tensor


class Reference:
    """A LLaVA-1.5 checkpoint, with or without an adapter, in float32 on the CPU.

    Args:
        checkpoint: folder of a llava-1.5 checkpoint.
        adapter: folder of a PEFT adapter for it.
    """

    def __init__(self, checkpoint: Path, adapter: Path | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = AutoImageProcessor.from_pretrained(checkpoint)
        self.llava = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.config = self.llava.config
        if adapter is not None:
            self._add_adapter(adapter)

    def _add_adapter(self, adapter: Path) -> None:
        from peft import PeftModel

        # PEFT puts its layers into `self.llava` itself; the wrapper is not needed after that.
        PeftModel.from_pretrained(self.llava, str(adapter)).eval()

    @property
    def tower(self) -> CLIPVisionModel:
        """The vision tower."""
        return self.llava.model.vision_tower

    @property
    def feature_layer(self) -> int:
        """Index of the tower layer whose output becomes the features.

        `hidden_states` starts with the embeddings: -2 is the output of the last layer but one,
        row L - 2 of the attention.
        """
        layer = self.config.vision_feature_layer
        num_layers = self.config.vision_config.num_hidden_layers
        return layer - 1 if layer > 0 else num_layers + layer

    def process(self, images: Sequence[Image.Image]) -> Tensor:
        """Pixels as the checkpoint's processor gives them, `(N, 3, H, W)` float32."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"].float()

    @torch.inference_mode()
    def see(self, pixel_values: Tensor) -> Seen:
        """Runs the tower with all of its attention, `(N, 3, H, W)`."""
        output = self.tower(pixel_values, output_attentions=True, output_hidden_states=True)
        rows = [layer[:, :, 0, 1:].float().mean(dim=1) for layer in output.attentions]
        features = output.hidden_states[self.config.vision_feature_layer]
        return Seen(features=features[:, 1:], cls_attention=torch.stack(rows, dim=1))

    def keep(self, seen: Seen, index: int, *, ratio: float, selector: str, seed: int = 0) -> Tensor:
        """Kept patches of one image, `(K,)`."""
        view = PatchView(
            features=seen.features[index],
            cls_attention=seen.cls_attention[index],
            feature_layer=self.feature_layer,
            num_kept=num_kept(seen.features.shape[1], ratio),
            seed=seed,
        )
        return select(selector, view)

    @torch.inference_mode()
    def embed(self, prompt_ids: Sequence[int], kept_features: Sequence[Tensor]) -> Tensor:
        """Input of the language model, `(S, E)`.

        Args:
            prompt_ids: with one image token an image.
            kept_features: `(K, D)` of each image, in the prompt's order.
        """
        ids = torch.tensor(prompt_ids)
        is_image = ids == self.config.image_token_id
        if int(is_image.sum()) != len(kept_features):
            raise ValueError(
                f"{int(is_image.sum())} image tokens in the prompt, {len(kept_features)} images"
            )
        rows = list(self.llava.get_input_embeddings()(ids)[:, None])
        positions = is_image.nonzero()[:, 0].tolist()
        for position, features in zip(positions, kept_features, strict=True):
            rows[position] = self.llava.model.multi_modal_projector(features)
        return torch.cat(rows)

    @torch.inference_mode()
    def score(
        self,
        images: Sequence[Image.Image] | Tensor,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int],
        *,
        ratio: float = 1.0,
        selector: str = "cls",
        seeds: Sequence[int] = (),
    ) -> Scored:
        """Kept patches, attention and the log-probabilities of an answer (teacher forced).

        Args:
            images: pictures, or pixels `(N, 3, H, W)` that were processed before.
            prompt_ids: rendered prompt's ids with one image token an image.
            answer_ids: canonical ids of the answer, A of them.
            ratio: retention ratio.
            selector: a name in `patches.selection.SELECTORS`.
            seeds: one an image, for the selector `random`.
        """
        kept: list[Tensor] = []
        features: list[Tensor] = []
        attention: tuple[Tensor, ...] = ()
        if len(images):
            pixels = images if isinstance(images, Tensor) else self.process(images)
            seen, seeds = self.see(pixels), seeds or [0] * len(pixels)
            for index, seed in enumerate(seeds):
                kept.append(self.keep(seen, index, ratio=ratio, selector=selector, seed=seed))
                features.append(seen.features[index, kept[-1]])
            attention = tuple(seen.cls_attention)
        prompt = self.embed(prompt_ids, features)
        answer = self.llava.get_input_embeddings()(torch.tensor(answer_ids[:-1], dtype=torch.long))
        logits = self.llava(inputs_embeds=torch.cat([prompt, answer])[None]).logits[0]
        logprobs = logits[len(prompt) - 1 :].float().log_softmax(dim=-1)
        return Scored(kept=tuple(kept), cls_attention=attention, logprobs=logprobs)

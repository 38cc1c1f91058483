"""The module that `transformers.Trainer` trains: a LLaVA with a few weights that learn.

Letters: B examples of a batch, S ids, N images, K visual tokens an image, D tower width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from train.examples import IGNORED
from train.model import Llava


class Student(nn.Module):
    """Loss of the answers' ids; its state is what learns and nothing else.

    Logits are computed where there is an answer id only: under LLaVA-1.5's vocabulary of 32,064
    those of whole prompts would be the largest tensor of the step.
    """

    def __init__(self, model: Llava, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.llava = model.llava
        self._model = (model,)  # not a submodule of this one
        self._label_smoothing = label_smoothing

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        weights: Tensor,
        features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """Weighted mean cross-entropy.

        Args:
            input_ids: `(B, S)`, each image as K image tokens.
            labels: `(B, S)` next ids, `IGNORED` outside the answers.
            weights: `(B, S)` of the labels in the loss.
            features: `(N, K, D)` of the tower, in the order of the prompts.
            pixel_values: `(N, 3, H, W)` to run the tower on, instead.
            num_items_in_batch: answer ids of the whole optimizer step.
        """
        embeds = self.llava.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self._see(pixel_values)
        if features is not None:
            rows = self.llava.model.multi_modal_projector(features.to(self.llava.dtype))
            is_image = (input_ids == self.llava.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(is_image, rows.to(embeds.dtype))
        hidden = self.llava.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
        is_answer = labels != IGNORED
        logits = self.llava.lm_head(hidden[is_answer]).float()
        losses = F.cross_entropy(
            logits, labels[is_answer], reduction="none", label_smoothing=self._label_smoothing
        )
        total = (losses * weights[is_answer]).sum()
        return {
            "loss": total / (is_answer.sum() if num_items_in_batch is None else num_items_in_batch)
        }

    @torch.no_grad()
    def _see(self, pixel_values: Tensor) -> Tensor:
        output = self.llava.model.vision_tower(
            pixel_values.to(self.llava.dtype), output_hidden_states=True
        )
        return output.hidden_states[self.llava.config.vision_feature_layer][:, 1:]

    def learned(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What learns: a checkpoint holds megabytes, not the frozen model."""
        return {name: p.detach().cpu().contiguous() for name, p in self.learned().items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> _IncompatibleKeys:
        """Restores what `state_dict` gave."""
        learned = self.learned()
        assert learned.keys() == state_dict.keys(), "a checkpoint of another recipe"
        with torch.no_grad():
            for name, parameter in learned.items():
                parameter.copy_(state_dict[name])
        return _IncompatibleKeys([], [])

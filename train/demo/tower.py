"""The vision tower, trained as CLIP was: images against captions.

Letters: N images, P patches, D tower width, E width of the shared space, C captions.

Captions name only the face. Beside the contrastive loss, each patch feature is asked whether it
holds a face and which: that makes the tower learn several times faster, and it makes a patch
mean something by itself, which is what a language model reads. Nothing tells the [CLS] token
where to look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange
from transformers import CLIPVisionModel, LlamaTokenizer

from serving.structures import SENTIMENTS
from train.demo.augment import augment
from train.demo.chats import CAPTIONS
from train.demo.checkpoint import vision_config
from train.demo.dataset import normalize


@dataclass(frozen=True, kw_only=True)
class TowerRecipe:
    """How the tower is trained."""

    num_steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    warmup_share: float = 0.12
    patch_weight: float = 2.0
    save_every: int = 100


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Training images: `(N, 3, 112, 112)` uint8, `(N, 64)` bool masks, `(N,)` label indices."""

    pixels: Tensor
    masks: Tensor
    labels: Tensor


class Clip(nn.Module):
    """A CLIP vision tower with what it needs in training only: captions and a patch head."""

    def __init__(self, tokenizer: LlamaTokenizer, width: int = 64) -> None:
        super().__init__()
        config = vision_config()
        config._attn_implementation = "eager"  # twice as fast as sdpa to train on a CPU
        self.tower = CLIPVisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, width, bias=False)
        self.words = nn.EmbeddingBag(len(tokenizer), width, mode="mean")
        self.text_projection = nn.Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.patch_head = nn.Linear(config.hidden_size, 1 + len(SENTIMENTS))
        self.captions, self.caption_labels = _encode_captions(tokenizer)

    def embed_captions(self) -> Tensor:
        """All captions in the shared space, `(C, E)`."""
        bags = torch.stack([self.words(ids[None])[0] for ids in self.captions])
        return F.normalize(self.text_projection(bags).float(), dim=-1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity to each caption `(N, C)`, and what each patch says it is `(N, P, 4)`."""
        output = self.tower(pixels, output_hidden_states=True)
        images = F.normalize(self.visual_projection(output.pooler_output).float(), dim=-1)
        similarity = self.logit_scale.exp().clamp(max=50) * images @ self.embed_captions().T
        return similarity, self.patch_head(output.hidden_states[-2][:, 1:]).float()


def train_tower(
    pictures: Pictures, tokenizer: LlamaTokenizer, recipe: TowerRecipe, seed: int, state: Path
) -> CLIPVisionModel:
    """A trained tower; continues from `state` where that file exists."""
    torch.manual_seed(seed)
    model = Clip(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=(0.9, 0.98),
    )
    first = load_state(state, model, optimizer)
    steps = trange(first, recipe.num_steps, initial=first, total=recipe.num_steps, desc="tower")
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * one_cycle(
                step / recipe.num_steps, recipe.warmup_share
            )
        loss = _train_step(model, optimizer, pictures, recipe, _generator(seed, step))
        steps.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if (step + 1) % recipe.save_every == 0:
            save_state(state, model, optimizer, step + 1)
    return model.tower.eval()


def one_cycle(progress: float, warmup_share: float) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine to 0."""
    if progress < warmup_share:
        return (progress + 1e-3) / warmup_share
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup_share) / (1 - warmup_share))


def _train_step(
    model: Clip,
    optimizer: torch.optim.Optimizer,
    pictures: Pictures,
    recipe: TowerRecipe,
    generator: torch.Generator,
) -> float:
    chosen = _draw_balanced(pictures.labels, recipe.batch_size, generator)
    labels = pictures.labels[chosen]
    pixels, masks = augment(pictures.pixels[chosen], pictures.masks[chosen], generator)
    with torch.autocast("cpu", torch.bfloat16):
        similarity, patches = model(normalize(pixels))
    loss = contrastive_loss(similarity, labels, model.caption_labels)
    loss = loss + recipe.patch_weight * patch_loss(patches, masks, labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss)


def contrastive_loss(similarity: Tensor, labels: Tensor, caption_labels: Tensor) -> Tensor:
    """CLIP's loss where several captions fit an image, and several images a caption.

    Args:
        similarity: `(N, C)` logits.
        labels: `(N,)` of the images.
        caption_labels: `(C,)` of the captions.
    """
    fits = (labels[:, None] == caption_labels[None]).float()
    to_caption = -(fits / fits.sum(1, keepdim=True) * similarity.log_softmax(1)).sum(1).mean()
    to_image = -(fits / fits.sum(0).clamp(min=1) * similarity.log_softmax(0)).sum(0).mean()
    log_fits = to_caption - fits.sum(1).log().mean()  # 0 where every fitting caption is alike
    return log_fits + 0.5 * (to_image - fits.sum(0).clamp(min=1).log().mean())


def patch_loss(patches: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each patch over no face and the three faces."""
    targets = torch.where(masks, labels[:, None] + 1, 0)
    weight = torch.tensor([0.15] + [1.0] * len(SENTIMENTS))  # most patches hold no face
    return F.cross_entropy(patches.flatten(0, 1), targets.flatten(), weight=weight)


def _encode_captions(tokenizer: LlamaTokenizer) -> tuple[list[Tensor], Tensor]:
    captions, labels = [], []
    for index, label in enumerate(SENTIMENTS):
        for caption in CAPTIONS[label]:
            captions.append(torch.tensor(tokenizer.encode(caption, add_special_tokens=False)))
            labels.append(index)
    return captions, torch.tensor(labels)


def _draw_balanced(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    weights = 1.0 / torch.bincount(labels, minlength=len(SENTIMENTS))[labels]
    return torch.multinomial(weights, count, generator=generator)


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """What a stopped training goes on from, in place by one rename."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores a state and says which step comes next; 0 where there is none."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])

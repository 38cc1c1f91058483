"""What a training would do, said without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving.structures import LabelStructure
from train.examples import Collator, Examples
from train.fit import Material, check_selector, describe_posts
from train.lora import add_lora
from train.model import DTYPES, Llava, load_llava
from train.recipes import Recipe
from train.sight import Sight
from train.student import Student


def preview(
    recipe: Recipe, structure: LabelStructure, material: Material, *, base: Path
) -> dict[str, Any]:
    """What a training would do, without training: sizes, steps, memory, one example."""
    check_selector(recipe)
    model = load_llava(base, dtype=DTYPES[recipe.dtype])
    sight = Sight(model)
    examples = Examples(
        model,
        structure,
        material.train,
        weight_power=recipe.weight_power,
        prompts=material.prompts,
    )
    add_lora(model, recipe)
    student = Student(model)
    learned = sum(p.numel() for p in student.learned().values())
    total = sum(p.numel() for p in student.parameters())
    collator = Collator(model, sight, recipe, is_cached=True)
    lengths = examples.lengths(collator.tokens_per_image)
    per_epoch = -(-len(examples) // recipe.batch_size)
    first = examples[0]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "train": describe_posts(structure, material.train),
        "dev": describe_posts(structure, material.dev),
        "parameters": {"total": total, "trainable": learned, "share": learned / total},
        "steps": {"per_epoch": per_epoch, "total": round(per_epoch * recipe.num_epochs)},
        "tokens": {
            "mean": round(float(lengths.mean()), 1),
            "longest": int(lengths.max()),
            "per_image": collator.tokens_per_image,
        },
        "memory_gib": estimate_memory(model, recipe, learned, int(lengths.max())),
        "cache_gib": round(
            len({i for p in material.train for i in p.images}) * sight.bytes_per_image / 2**30, 3
        ),
        "example": {
            "id": first.id,
            "prompt": model.tokenizer.decode(first.prompt_ids),
            "answer": model.tokenizer.decode(first.answer_ids),
            "prompt_ids": list(first.prompt_ids),
            "answer_ids": list(first.answer_ids),
            "weights": [round(weight, 3) for weight in first.weights],
        },
    }


def estimate_memory(model: Llava, recipe: Recipe, learned: int, longest: int) -> dict[str, float]:
    """GiB by purpose, a device: what is counted exactly, and a rule of thumb for activations.

    Activations: about 34 bytes a token, layer and channel in 16 bits (Korthikanti et al.,
    arXiv:2205.05198, without the attention matrix that fused attention never holds), one hidden
    state a layer with gradient checkpointing.
    """
    text = model.config.text_config
    tokens = recipe.micro_batch_size * longest
    scale = 1 if recipe.dtype == "bfloat16" else 2
    a_layer = tokens * text.hidden_size * scale
    activations = a_layer * text.num_hidden_layers * (2 if recipe.gradient_checkpointing else 34)
    if recipe.gradient_checkpointing:
        activations += a_layer * 34
    weights = sum(p.numel() * p.element_size() for p in model.llava.parameters())
    sizes = {
        "weights": weights,
        "gradients and optimizer": learned * 12,
        "activations (rule of thumb)": activations,
    }
    found = {name: round(size / 2**30, 3) for name, size in sizes.items()}
    return {**found, "sum": round(sum(sizes.values()) / 2**30, 3)}

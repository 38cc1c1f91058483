"""The demo's adapters: LoRA on the language model, as vLLM can load it."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration

from serving.structures import LabelStructure
from train.demo.decoder import AnswerRecipe, train_answers
from train.demo.examples import Album, label_source

RANK = 16  # vLLM takes 1, 8, 16, 32, ... as the highest rank
BASE_NAME = "llava-sieve-demo"

# Anchored on the language model: a bare `q_proj` would also hit the tower, whose LoRA vLLM
# ignores. vLLM refuses LoRA biases, DoRA and `modules_to_save`.
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

ADAPTERS = ("llavac", "sentiment")
# At 3e-3 the answers fit the training prompts as well, and break when fewer patches are kept.
LORA_RECIPE = AnswerRecipe(num_steps=240, learning_rate=3e-3)


def train_adapter(
    llava: LlavaForConditionalGeneration,
    tokenizer: object,
    album: Album,
    structure: LabelStructure,
    *,
    seed: int,
    folder: Path,
) -> None:
    """Trains one adapter on a base model and writes PEFT's files into `folder`."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=TARGETS,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_NAME,
    )
    adapted = get_peft_model(llava, config)
    source = label_source(tokenizer, album, structure)
    train_answers(llava, album, source, LORA_RECIPE, seed=seed, name=structure.name)
    adapted.peft_config["default"].base_model_name_or_path = BASE_NAME
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)

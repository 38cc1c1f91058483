import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from patches.selection import SELECTORS, num_kept
from serving.manifest import fingerprint, load_manifest
from serving.prompts import encode, encode_answer, render_prompt
from serving.structures import STRUCTURES
from train.demo.build import REPORT_NAME, SHIPPED
from train.demo.dataset import normalize, stack_pixels, synthesize
from train.demo.lora import ADAPTERS
from train.demo.quality import load_test
from train.demo.sweep import RATIOS, answer_posts, measure, see_posts
from train.reference import Reference

BASE = SHIPPED / "base"
NUM_SAMPLE = 90


def shipped(adapter: str) -> Reference:
    return Reference(BASE, SHIPPED / "adapters" / adapter)


@pytest.fixture(scope="module")
def report():
    return json.loads((SHIPPED / REPORT_NAME).read_text())


@pytest.fixture(scope="module")
def sample():
    return load_test("test", balanced=True, seed=1, count=NUM_SAMPLE)


def test_transformers_loads_it_without_missing_or_unexpected_weights():
    _, loading = LlavaForConditionalGeneration.from_pretrained(BASE, output_loading_info=True)
    assert not any(loading.values()), loading


def test_weights_have_the_published_names():
    with safe_open(BASE / "model.safetensors", "pt") as file:
        names = set(file.keys())
    roots = ("language_model.model.", "language_model.lm_head.", "multi_modal_projector.")
    assert all(name.startswith((*roots, "vision_tower.vision_model.")) for name in names)
    last = json.loads((BASE / "config.json").read_text())["vision_config"]["num_hidden_layers"] - 1
    assert f"vision_tower.vision_model.encoder.layers.{last}.self_attn.k_proj.weight" in names


def test_the_processor_gives_the_pixels_that_training_used():
    posts = list(synthesize(2, split="test", balanced=True, seed=0))
    processor = AutoProcessor.from_pretrained(BASE)
    images = [Image.fromarray(post.pixels) for post in posts]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, normalize(stack_pixels(posts)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_touches_the_language_model_only(adapter):
    folder = SHIPPED / "adapters" / adapter
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_manifest_names_its_structure_and_this_base(adapter):
    manifest = load_manifest(SHIPPED / "adapters" / adapter)
    assert manifest is not None
    assert manifest.structure_name == adapter
    assert manifest.base_fingerprint == fingerprint(BASE)
    assert manifest.quality["balanced test, r=0.4"]["accuracy"] >= 0.92


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.xfail(reason="the shipped demo is just short of its goals: README, Limits")
def test_the_report_meets_the_goals(report, adapter):
    by_ratio = report["adapters"][adapter]["balanced test"]["cls"]
    assert by_ratio["1"]["accuracy"] >= 0.97
    assert by_ratio["0.4"]["accuracy"] >= 0.95


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_report_needs_both_image_and_text(report, adapter):
    figures = report["adapters"][adapter]
    by_ratio = figures["balanced test"]["cls"]
    assert set(figures["balanced test"]) == set(SELECTORS)
    assert set(by_ratio) == {f"{ratio:g}" for ratio in RATIOS}
    assert by_ratio["1"]["accuracy"] >= 0.95
    assert by_ratio["0.4"]["accuracy"] >= 0.92
    for case, quality in figures.items():
        if "only" in case:
            assert quality["accuracy"] <= by_ratio["1"]["accuracy"] - 0.15, case


def test_cls_attention_lands_on_the_face(report):
    attention = report["attention"]
    assert attention["share, mean"] >= 4 * attention["share, uniform"]
    assert attention["recall, cls 0.4"] >= 0.9


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_what_ships_is_as_good_as_the_report_says(report, sample, adapter, ratio):
    reference, structure = shipped(adapter), STRUCTURES[adapter]
    seen = see_posts(reference, sample)
    found = answer_posts(reference, structure, sample.texts, seen, ratio=ratio)
    accuracy = measure(structure, found, sample.labels)["accuracy"]
    said = report["adapters"][adapter]["balanced test"]["cls"][f"{ratio:g}"]["accuracy"]
    assert accuracy >= said - 0.06


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_reference_keeps_the_count_and_scores_every_answer_id(selector):
    reference = shipped("llavac")
    post = next(synthesize(1, split="test", balanced=True, seed=0))
    structure, tokenizer = STRUCTURES["llavac"], reference.tokenizer
    prompt = render_prompt(tokenizer, structure, post.text, 1)
    answer = encode_answer(tokenizer, prompt, structure.render(post.labels))
    scored = reference.score(
        [Image.fromarray(post.pixels)],
        encode(tokenizer, prompt),
        answer,
        ratio=0.4,
        selector=selector,
        seeds=[17],
    )
    assert scored.kept[0].shape == (num_kept(64, 0.4),)
    assert scored.kept[0].diff().min() > 0
    assert scored.cls_attention[0].shape == (4, 64)
    assert scored.answer_logprobs(answer).shape == (len(answer),)
    torch.testing.assert_close(scored.logprobs.exp().sum(-1), torch.ones(len(answer)))


def test_the_reference_at_ratio_one_is_transformers_own_llava():
    reference = Reference(BASE)
    post = next(synthesize(1, split="test", balanced=True, seed=0))
    image, prompt = Image.fromarray(post.pixels), "USER: <image>\nDescribe the image. ASSISTANT:"
    answer = encode_answer(reference.tokenizer, prompt, "The image shows a smiling face.")
    scored = reference.score([image], encode(reference.tokenizer, prompt), answer)
    processor = AutoProcessor.from_pretrained(BASE)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    with torch.inference_mode():
        logits = reference.llava(**inputs).logits[0, -1]
    torch.testing.assert_close(scored.logprobs[0], logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_free_chat_gives_a_readable_answer():
    reference = Reference(BASE)
    inputs = reference.tokenizer("USER: Hello ASSISTANT:", return_tensors="pt")
    ids = reference.llava.generate(**inputs, max_new_tokens=32, do_sample=False)
    answer = reference.tokenizer.decode(
        ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert answer.strip() == "Hello! Show me a picture and a line of text."


def test_the_whole_demo_stays_small():
    total = sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file())
    assert total < 12 * 2**20

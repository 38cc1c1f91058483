"""The server against an independent Hugging Face reference, and against stock vLLM.

All in float32. Tolerances: labels and kept indices equal; probabilities within 1e-4.
"""

import functools
import itertools
import math
from pathlib import Path

import pytest
import torch

from patches.selection import SELECTORS, image_seed
from serving.catalogue import Choices
from serving.prompts import encode, render_prompt
from serving.settings import DEMO
from tests.pictures import noise
from tests.stock import StockServer
from train.reference import Reference

RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)
TOLERANCE = 1e-4
SIZES = ((112, 112), (160, 90), (70, 200))
CASES = list(itertools.product(RATIOS, SELECTORS))


@pytest.fixture(scope="module", params=["demo", "published"])
def case(request):
    """A running server with its checkpoint, adapters and structure for each of them."""
    if request.param == "demo":
        adapters = DEMO / "adapters"
        structures = {None: "sentiment", "llavac": "llavac", "sentiment": "sentiment"}
        return request.getfixturevalue("demo_server"), DEMO / "base", adapters, structures
    folder = request.getfixturevalue("published_adapters")
    structures = {None: "llavac", "first": "llavac", "second": "sentiment"}
    server = request.getfixturevalue("published_server")
    return server, request.getfixturevalue("published"), folder, structures


@functools.cache
def reference(base: Path, adapter: Path | None) -> Reference:
    return Reference(base, adapter)


def reference_for(case, adapter):
    _, base, folder, _ = case
    return reference(base, folder / adapter if adapter else None)


def reference_probabilities(case, adapter, structure, image, text, answered, ratio, selector):
    """Renormalised probabilities of each field's labels along the answered path."""
    server, yardstick = case[0], reference_for(case, adapter)
    tokenizer, constraint = server.labeler.tokenizer, server.labeler.constraints[structure]
    prompt = encode(tokenizer, render_prompt(tokenizer, constraint.structure, text, 1))
    pixels = yardstick.process([image])
    scored = yardstick.score(
        pixels,
        prompt,
        constraint.answer_ids(answered),
        ratio=ratio,
        selector=selector,
        seeds=[image_seed(pixels[0])],
    )
    found, step = {}, 0
    for field in constraint.fields:
        lengths = {len(ids) for ids in field.segments.values()}
        assert len(lengths) == 1, "this reference needs labels that branch at their last id"
        step += lengths.pop()
        allowed = [ids[-1] for ids in field.segments.values()]
        row = scored.logprobs[step - 1, allowed].softmax(dim=-1)
        found[field.name] = dict(zip(field.segments, row.tolist(), strict=True))
    return found, scored


@pytest.mark.parametrize(("ratio", "selector"), CASES)
def test_labels_and_probabilities_equal_the_reference(case, ratio, selector):
    server, _, _, structures = case
    for number, (adapter, structure) in enumerate(structures.items()):
        image, text = noise(number, SIZES[number]), "a good day in the park"
        choices = Choices(
            model=adapter, label_structure=structure, retention_ratio=ratio, selector=selector
        )
        scores = server.call(server.labeler.label(text, [image], choices)).scores
        expected, _ = reference_probabilities(
            case, adapter, structure, image, text, scores.labels, ratio, selector
        )
        for field, probabilities in expected.items():
            assert scores.labels[field] == max(probabilities, key=probabilities.get)
            assert scores.probabilities[field] == pytest.approx(probabilities, abs=TOLERANCE)


def select_in_worker(server, pixels, kept, selectors, seeds):
    raw = pixels.numpy().tobytes()
    rpc = server.labeler.engine.engine._llm.collective_rpc
    args = (raw, list(pixels.shape), kept, selectors, seeds)
    return server.call(rpc("sieve_select", args=args))[0]


@pytest.mark.parametrize(("ratio", "selector"), CASES)
def test_kept_patches_equal_the_references_in_float32(case, ratio, selector):
    server, yardstick = case[0], reference_for(case, None)
    pixels = yardstick.process([noise(seed, SIZES[seed % 3]) for seed in range(6)])
    seen = yardstick.see(pixels)
    seeds = [image_seed(image) for image in pixels]
    expected = [
        yardstick.keep(seen, index, ratio=ratio, selector=selector, seed=seed).tolist()
        for index, seed in enumerate(seeds)
    ]
    kept = [len(indices) for indices in expected]
    assert select_in_worker(server, pixels, kept, [selector] * 6, seeds) == expected


def test_mixed_ratios_and_selectors_in_one_batch_keep_what_they_keep_alone(case):
    """Twenty images: more than one micro-batch of the tower."""
    server, yardstick = case[0], reference_for(case, None)
    count = 20
    assert count > server.settings.tower_batch_size
    pixels = yardstick.process([noise(seed) for seed in range(count)])
    num_patches = server.labeler.engine.info.num_patches
    kept = [max(1, num_patches * (index + 1) // count) for index in range(count)]
    names = [list(SELECTORS)[index % len(SELECTORS)] for index in range(count)]
    seeds = list(range(count))
    together = select_in_worker(server, pixels, kept, names, seeds)
    for index in range(count):
        one = slice(index, index + 1)
        assert together[one] == select_in_worker(
            server, pixels[one], kept[one], names[one], seeds[one]
        )


def test_shared_first_tokens_score_like_every_answer_scored_alone(
    published_server, published, published_adapters
):
    """15 answers, three of whose labels share a first token, each scored by Hugging Face."""
    passes = []
    for adapter in (None, "first", "second"):
        yardstick = reference(published, published_adapters / adapter if adapter else None)
        for seed in (4, 5):
            result, mass = _label_and_score_exhaustively(published_server, yardstick, adapter, seed)
            passes.append(result.num_passes)
            assert sum(mass.values()) == pytest.approx(1.0, abs=1e-4)
            answered = ()
            for field, found in result.scores.probabilities.items():
                assert found == pytest.approx(_conditional(mass, answered), abs=TOLERANCE)
                answered = (*answered, result.scores.labels[field])
    assert max(passes) > 1, "no answer left the shared token's branch: other images are needed"


def _label_and_score_exhaustively(server, yardstick, adapter, seed):
    constraint, tokenizer = server.labeler.constraints["quality"], server.labeler.tokenizer
    image, text, ratio = noise(seed), "a great day", 0.4
    choices = Choices(model=adapter, label_structure="quality", retention_ratio=ratio)
    result = server.call(server.labeler.label(text, [image], choices))
    prompt = encode(tokenizer, render_prompt(tokenizer, constraint.structure, text, 1))
    paths = {
        tuple(labels.values()): [*constraint.answer_ids(labels), tokenizer.eos_token_id]
        for labels in constraint.structure.answers()
    }
    pixels = yardstick.process([image])
    rows = {
        labels: yardstick.score(pixels, prompt, ids, ratio=ratio).logprobs
        for labels, ids in paths.items()
    }
    return result, {labels: _renormalised_mass(paths, labels, rows[labels]) for labels in paths}


def _conditional(mass, answered):
    """Probability of each next label, given the labels answered before it."""
    depth = len(answered)
    under = {labels: weight for labels, weight in mass.items() if labels[:depth] == answered}
    found = dict.fromkeys(labels[depth] for labels in under)
    for label in found:
        weights = [weight for labels, weight in under.items() if labels[depth] == label]
        found[label] = sum(weights) / sum(under.values())
    return found


def _renormalised_mass(paths, labels, rows):
    """Probability of one answer, each step renormalised over what any answer allows there."""
    total = 0.0
    for step, token_id in enumerate(paths[labels]):
        prefix = paths[labels][:step]
        allowed = sorted({ids[step] for ids in paths.values() if ids[:step] == prefix})
        row = rows[step, allowed].log_softmax(dim=-1)
        total += float(row[allowed.index(token_id)])
    return math.exp(total)


@pytest.fixture(scope="module")
def stock():
    with StockServer(dtype="float32") as server:
        yield server


@pytest.mark.parametrize("adapter", [None, "llavac", "sentiment"])
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_at_ratio_one_the_server_equals_stock_vllm(demo_server, stock, adapter, num_images):
    images = [noise(seed, SIZES[seed]) for seed in range(num_images)]
    choices = Choices(model=adapter, label_structure="llavac")
    ours, theirs = (
        server.call(server.labeler.label("a good day", images, choices))
        for server in (demo_server, stock)
    )
    assert ours.generated.num_prompt_tokens == theirs.generated.num_prompt_tokens
    assert ours.scores.labels == theirs.scores.labels
    for field, probabilities in theirs.scores.probabilities.items():
        assert ours.scores.probabilities[field] == pytest.approx(probabilities, abs=1e-6)


SWAP_TOLERANCE = 0.02
"""bf16 may swap patches whose float32 scores are within this share of the last kept one's."""


@pytest.mark.parametrize("ratio", [0.8, 0.4, 0.05])
@pytest.mark.parametrize("selector", ["cls", "cls-last"])
def test_in_bfloat16_only_near_ties_swap(bfloat16_server, ratio, selector):
    yardstick = reference(DEMO / "base", None)
    pixels = yardstick.process([noise(seed, SIZES[seed % 3]) for seed in range(6)])
    seen = yardstick.see(pixels)
    kept = max(1, math.floor(64 * ratio + 0.5))
    found = select_in_worker(bfloat16_server, pixels, [kept] * 6, [selector] * 6, [0] * 6)
    for index, indices in enumerate(found):
        wanted = yardstick.keep(seen, index, ratio=ratio, selector=selector)
        rows = seen.cls_attention[index]
        scores = rows.mean(dim=0) if selector == "cls" else rows[yardstick.feature_layer]
        bar = scores[wanted].min()
        swapped = sorted(set(indices) ^ set(wanted.tolist()))
        assert torch.all((scores[swapped] - bar).abs() <= SWAP_TOLERANCE * bar), swapped

"""Adapters with projector weights, from folder to answer, against Hugging Face."""

import asyncio
import functools
import math

import pytest

from serving.catalogue import Choices
from serving.prompts import encode, render_prompt
from tests.checkpoints import build_adapter
from tests.pictures import noise
from tests.running import RunningServer
from train.reference import Reference

pytestmark = pytest.mark.long
TARGETS = r".*(language_model.*\.(q_proj|v_proj)|multi_modal_projector\.linear_\d)"
MODELS = ("published", "plain", "sharp", "soft")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def adapters(published, tmp_path_factory):
    """Two adapters on the projector, which differ there, and one without it."""
    folder = tmp_path_factory.mktemp("projector")
    for seed, name in enumerate(("sharp", "soft"), start=7):
        build_adapter(published, folder / name, seed=seed, scale=0.2, target_modules=TARGETS)
    build_adapter(published, folder / "plain", seed=9)
    return folder


@pytest.fixture(scope="module")
def server(published, adapters):
    with RunningServer(
        model=str(published),
        adapters=adapters,
        dtype="float32",
        max_model_len=2600,
        model_name="published",
    ) as server:
        yield server


@pytest.fixture(scope="module")
def expected(published, adapters):
    """Log-probabilities of the first field's labels, by Hugging Face."""

    @functools.cache
    def reference(model):
        return Reference(published, None if model == "published" else adapters / model)

    def ask(server, model, image, text, ratio):
        tokenizer = server.labeler.tokenizer
        constraint = server.labeler.constraints["sentiment"]
        prompt = encode(tokenizer, render_prompt(tokenizer, constraint.structure, text, 1))
        answer = constraint.answer_ids({"sentiment": "positive"})
        scored = reference(model).score([image], prompt, answer, ratio=ratio)
        segments = constraint.fields[0].segments
        row = scored.logprobs[0, [ids[0] for ids in segments.values()]].softmax(dim=-1)
        return dict(zip(segments, row.tolist(), strict=True))

    return ask


def in_logs(probabilities):
    return {label: math.log(value) for label, value in probabilities.items()}


def ask_all(server, image, text, ratio):
    """All models at once: one batch, one image, one prompt."""

    async def together():
        return await asyncio.gather(
            *(
                server.labeler.label(
                    text,
                    [image],
                    Choices(model=model, label_structure="sentiment", retention_ratio=ratio),
                )
                for model in MODELS
            )
        )

    results = server.call(together())
    return {
        model: result.scores.probabilities["sentiment"]
        for model, result in zip(MODELS, results, strict=True)
    }


@pytest.mark.parametrize("ratio", [1.0, 0.4, 0.05])
def test_each_adapter_of_a_batch_projects_one_image_its_own_way(server, expected, ratio):
    image = noise(int(100 * ratio), (150, 90))
    for text in ("a good day", "a very bad day"):  # the second time the image is in the cache
        found = ask_all(server, image, text, ratio)
        for model in MODELS:
            wanted = expected(server, model, image, text, ratio)
            assert in_logs(found[model]) == pytest.approx(in_logs(wanted), abs=TOLERANCE)
        answers = {tuple(round(p, 4) for p in row.values()) for row in found.values()}
        assert len(answers) == len(MODELS), "every model must answer in its own way"


def test_an_image_is_seen_once_for_each_adapter_and_never_shared(server):
    image = noise(77)
    before = server.tower_images()
    ask_all(server, image, "a good day", 0.4)
    seen = server.tower_images()
    assert seen - before == len(MODELS)
    ask_all(server, image, "another good day in the park", 0.4)
    assert server.tower_images() == seen

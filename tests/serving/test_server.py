"""The real server over HTTP, with the `openai` client, caches, several adapters and bad input."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from patches.selection import num_kept
from tests.pictures import data_url, noise

RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)


ON_RAY = pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.long])


@pytest.fixture(params=["demo", "published", ON_RAY])
def server(request):
    return request.getfixturevalue(f"{request.param}_server")


def models(server):
    return [card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]]


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def picture(image):
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


QUESTION = {"type": "text", "text": "What is the sentiment of this post?"}


def test_token_counts_fall_as_the_ratio_says(server):
    patches = server.labeler.engine.info.num_patches
    image = data_url(noise(11))
    answers = [server.label(image=image, text="a day", retention_ratio=r) for r in RATIOS]
    text_only = server.label(text="a day")["usage"]["prompt_tokens"]
    for ratio, answer in zip(RATIOS, answers, strict=True):
        kept = num_kept(patches, ratio)
        assert answer["retention"]["kept"] == kept
        overhead = answer["usage"]["prompt_tokens"] - kept
        assert overhead == answers[0]["usage"]["prompt_tokens"] - patches
        assert 0 < overhead - text_only < 5  # the newline around the image


def test_every_model_labels_under_every_structure(server):
    for model in models(server):
        for name, structure in server.labeler.catalogue.structures.items():
            answer = server.label(
                image=data_url(noise(1)), text="x", model=model, label_structure=name
            )
            assert answer["model"] == model
            for field, labels in structure.fields.items():
                assert answer["labels"][field] in labels
                assert set(answer["probabilities"][field]) == set(labels)
                assert sum(answer["probabilities"][field].values()) == pytest.approx(1, abs=1e-5)


def test_an_adapter_changes_the_answer(server):
    base, *adapters = models(server)
    seen = []
    for model in (base, *adapters):
        body = {"image": data_url(noise(2)), "text": "x", "label_structure": "llavac"}
        seen.append(server.label(**body, model=model)["probabilities"]["multimodal"]["positive"])
    assert len({round(value, 4) for value in seen}) == len(seen)


def test_the_same_request_twice_hits_the_caches(server):
    body = {"image": data_url(noise(21)), "text": "twice", "retention_ratio": 0.8}
    before = server.tower_images()
    first, second = server.label(**body), server.label(**body)
    assert server.tower_images() == before + 1
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert second["labels"] == first["labels"]


def test_another_ratio_selector_or_adapter_shares_no_answer(server):
    base, adapter, *_ = models(server)
    body = {"image": data_url(noise(22)), "text": "never shared", "model": base}
    variants = [
        {"retention_ratio": 0.8},
        {"retention_ratio": 0.4},
        {"retention_ratio": 0.4, "selector": "stride"},
        {"retention_ratio": 0.4, "selector": "random"},
    ]
    before = server.tower_images()
    for variant in variants:
        answer = server.label(**body, **variant)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert server.tower_images() == before + 1, "the tower's features are the same for all"
    other = server.label(**{**body, "model": adapter}, **variants[0])
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_an_image_that_was_seen_at_another_ratio_skips_the_tower_beside_one_that_was_not(server):
    seen, new = data_url(noise(23)), data_url(noise(24))
    before = server.tower_images()
    server.label(image=seen, text="first", retention_ratio=0.4)
    assert server.tower_images() == before + 1
    server.label(image=[seen, new], text="then", retention_ratio=0.6)
    assert server.tower_images() == before + 2
    server.label(image=[new, seen], text="at last", retention_ratio=1.0)
    assert server.tower_images() == before + 2


def test_equal_pixels_in_another_shape_are_another_image(server):
    wide, tall = noise(5, (100, 30)), noise(5, (30, 100))
    tall.frombytes(wide.tobytes())
    before = server.tower_images()
    for image in (wide, tall):
        server.label(image=data_url(image), text="shape", retention_ratio=0.8)
    assert server.tower_images() == before + 2


def test_requests_in_one_batch_answer_as_they_do_alone(server):
    bodies = [
        {
            "image": [data_url(noise(30 + number + i)) for i in range(1 + number % 2)],
            "text": f"post {number}",
            "model": model,
            "retention_ratio": ratio,
            "selector": selector,
            "label_structure": "llavac",
        }
        for number, (ratio, selector, model) in enumerate(
            zip(RATIOS, ["cls", "random", "stride"] * 2, models(server) * 2, strict=True)
        )
    ]
    alone = [server.label(**body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: server.label(**body), bodies))
    for one, other in zip(alone, together, strict=True):
        assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
        for field, probabilities in one["probabilities"].items():
            assert other["probabilities"][field] == pytest.approx(probabilities, abs=1e-4)


def test_chat_with_an_image_streaming_logprobs_and_usage(server):
    client, model = server.openai, models(server)[1]
    ask = {"model": model, "messages": user(picture(noise(3)), QUESTION), "temperature": 0}
    ask |= {"max_tokens": 6, "extra_body": {"retention_ratio": 0.4}}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)
    assert all(len(step.top_logprobs) == 3 for step in whole.choices[0].logprobs.content)
    stream = client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_chat_answers_one_allowed_label_under_a_structure(server):
    for model in models(server):
        for name, structure in server.labeler.catalogue.structures.items():
            ask = {"model": model, "messages": user(picture(noise(4)), QUESTION), "temperature": 1}
            answer = server.openai.chat.completions.create(
                **ask, n=3, seed=1, extra_body={"label_structure": name}
            )
            for choice in answer.choices:
                assert structure.render(structure.parse(choice.message.content))
                assert choice.message.content == choice.message.content.strip()
                assert choice.finish_reason == "stop"
            stream = server.openai.chat.completions.create(
                **ask, stream=True, extra_body={"label_structure": name}
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert structure.parse(text) is not None
            assert text == text.strip()


def test_chat_and_label_agree_where_the_prompt_is_the_same(server):
    model = models(server)[1]
    labelled = server.label(image=data_url(noise(6)), text="sun", model=model, retention_ratio=0.4)
    structure = server.labeler.catalogue.structures[labelled["label_structure"]]
    text = {"type": "text", "text": structure.prompt.replace("{text}", "sun")}
    answer = server.openai.chat.completions.create(
        model=model,
        messages=user(picture(noise(6)), text),
        temperature=0,
        extra_body={"retention_ratio": 0.4, "label_structure": structure.name},
    )
    assert structure.parse(answer.choices[0].message.content) == labelled["labels"]
    assert answer.usage.prompt_tokens == labelled["usage"]["prompt_tokens"]


def test_json_schema_and_choices_bind_a_chat(server):
    ask = {"model": models(server)[0], "messages": user(QUESTION), "temperature": 0}
    schema = {
        "type": "object",
        "properties": {"label": {"enum": ["good", "bad"]}},
        "required": ["label"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = server.openai.chat.completions.create(**ask, response_format=form, max_tokens=60)
    assert json.loads(answer.choices[0].message.content)["label"] in ("good", "bad")
    choices = ["bad day", "bad", "a very good day"]
    answer = server.openai.chat.completions.create(
        **ask, extra_body={"structured_outputs": {"choice": choices}}
    )
    assert answer.choices[0].message.content in choices


def test_errors_reach_the_openai_client_as_its_own_types(server):
    client, messages = server.openai, user(QUESTION)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="no", messages=messages)
    with pytest.raises(openai.BadRequestError, match="retention_ratio"):
        client.chat.completions.create(
            model=models(server)[0], messages=messages, extra_body={"retention_ratio": 7}
        )
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.chat.completions.create(
            model=models(server)[0], messages=user({"type": "text", "text": "a b " * 4000})
        )


def test_a_long_post_is_a_clear_400_and_the_engine_lives_on(server):
    answer = server.post("/v1/label", {"text": "x y " * 4000})
    assert answer.status_code == 400, answer.text
    assert "tokens" in answer.json()["error"]["message"]
    assert server.label(text="fine")["labels"]


def test_metrics_count_kept_and_saved_tokens_and_tower_images(server):
    names = ("sieve_kept_visual_tokens_total", "sieve_saved_visual_tokens_total")
    before = [server.metric(name) for name in names]
    patches = server.labeler.engine.info.num_patches
    kept = server.label(image=data_url(noise(77)), retention_ratio=0.2)["retention"]["kept"]
    assert [server.metric(name) for name in names] == [before[0] + kept, before[1] + patches - kept]
    deadline = time.monotonic() + 30  # on Ray an engine's numbers come a moment later
    while server.metric("sieve_tower_images") != server.tower_images():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert server.tower_images() > 0


def test_readiness_is_asked_of_the_engine(server):
    assert httpx.get(f"{server.url}/readyz").json() == {"status": "ready"}
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}


async def test_many_bad_requests_disturb_no_good_one(server):
    bad = [
        {"image": data_url(b"no")},
        {"retention_ratio": -1},
        {"model": "no"},
        {"image": "file:///etc/passwd"},
    ]
    good = {"image": data_url(noise(9)), "text": "good"}
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        posts = [client.post("/v1/label", json=body) for body in (bad * 10 + [good] * 10)]
        answers = await asyncio.gather(*posts)
    assert [answer.status_code for answer in answers[40:]] == [200] * 10
    assert {answer.status_code for answer in answers[:40]} == {400, 404}

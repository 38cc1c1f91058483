"""Adapters that come, change and go under a running server, in process and on Ray."""

import shutil
import threading
import time

import httpx
import pytest
from safetensors.torch import load_file, save_file

from serving.settings import DEMO
from tests.pictures import data_url, noise
from tests.running import RunningServer

ON_RAY = pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.long])


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    return shutil.copytree(DEMO / "adapters", tmp_path_factory.mktemp("adapters") / "folder")


@pytest.fixture(scope="module")
def in_process(own_folder):
    with RunningServer(dtype="float32", adapters=str(own_folder), max_loras=2) as server:
        yield server


@pytest.fixture(params=["in_process", ON_RAY])
def server(request):
    name = "ray_server" if request.param == "ray" else request.param
    return request.getfixturevalue(name)


@pytest.fixture
def folder(server):
    from pathlib import Path

    return Path(server.settings.adapters)


def put(folder, name, scale=1.0):
    """The demo's llavac adapter with its weights scaled."""
    path = shutil.copytree(DEMO / "adapters" / "llavac", folder / name)
    weights = load_file(path / "adapter_model.safetensors")
    scaled = {k: v * scale if "lora_B" in k else v for k, v in weights.items()}
    save_file(scaled, path / "adapter_model.safetensors")
    return path


def add(server, **body):
    return server.post("/v1/adapters", body)


def remove(server, name):
    return httpx.delete(f"{server.url}/v1/adapters/{name}", timeout=60)


def states(server):
    listing = httpx.get(f"{server.url}/v1/models").json()
    return {(card["id"], card["version"]): card["state"] for card in listing["adapters"]}


def probability(server, model):
    body = {"image": data_url(noise(5)), "text": "a day", "model": model, "retention_ratio": 0.8}
    return server.label(**body)["probabilities"]["multimodal"]["positive"]


def test_an_adapter_is_added_used_by_name_and_removed(server, folder):
    put(folder, "fresh", 0.5)
    assert server.post("/v1/label", {"model": "fresh", "text": "x"}).status_code == 404
    answer = add(server, name="fresh")
    assert answer.status_code == 200, answer.text
    assert answer.json()["state"] == "loaded"
    assert probability(server, "fresh") != pytest.approx(probability(server, "llavac"), abs=1e-6)
    chat = server.openai.chat.completions.create(
        model="fresh",
        messages=[{"role": "user", "content": "x"}],
        extra_body={"label_structure": "llavac"},
    )
    assert chat.model == "fresh"
    assert remove(server, "fresh").status_code == 200
    assert server.post("/v1/label", {"model": "fresh", "text": "x"}).status_code == 404
    assert remove(server, "fresh").status_code == 404


def test_a_new_version_takes_over_without_a_failed_or_mixed_answer(server, folder):
    put(folder, "hot", 1.0)
    assert add(server, name="hot").status_code == 200
    old = probability(server, "hot")
    seen, failed, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            body = {"image": data_url(noise(5)), "text": "a day", "model": "hot"}
            answer = server.post("/v1/label", {**body, "retention_ratio": 0.8})
            if answer.status_code != 200:
                failed.append(answer.text)
            else:
                seen.append(answer.json()["probabilities"]["multimodal"]["positive"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    put(folder, "hot@2", 0.6)
    answer = add(server, name="hot")
    assert answer.json()["version"] == "2", answer.text
    time.sleep(1)
    stop.set()
    for thread in threads:
        thread.join()
    new = probability(server, "hot")
    assert not failed
    assert abs(new - old) > 1e-4
    is_old = [abs(value - old) < 1e-5 for value in seen]
    assert all(was_old or abs(v - new) < 1e-5 for was_old, v in zip(is_old, seen, strict=True))
    assert any(is_old)
    assert not all(is_old)
    assert add(server, name="hot", version="").status_code == 200  # and back
    assert probability(server, "hot") == pytest.approx(old, abs=1e-5)


def test_fifty_bad_adapters_disturb_nobody(server, folder):
    broken = put(folder, "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    text_only = put(folder, "textonly")
    tensors = load_file(text_only / "adapter_model.safetensors")
    renamed = {k.replace("model.language_model.", ""): v for k, v in tensors.items()}
    save_file(renamed, text_only / "adapter_model.safetensors")
    before = probability(server, "llavac")
    for number in range(50):
        answer = add(server, name=("broken", "textonly")[number % 2])
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("adapter '")
        assert str(folder) not in answer.text
    assert states(server)["broken", ""] == states(server)["textonly", ""] == "refused"
    assert probability(server, "llavac") == before


def test_a_pin_needs_a_free_slot(server, folder):
    assert add(server, name="llavac", pinned=True).json()["pinned"]
    if server.settings.max_loras is not None:
        answer = add(server, name="sentiment", pinned=True)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "pin")
    assert probability(server, "llavac") > 0


def test_more_adapters_than_fit_are_served_from_disk(server, folder):
    for number in range(12):
        put(folder, f"many-{number}", 0.3 + 0.05 * number)
        assert add(server, name=f"many-{number}").status_code == 200
    first = [probability(server, f"many-{number}") for number in range(12)]
    assert len({round(value, 5) for value in first}) == 12
    shutil.rmtree(folder / "many-0")  # a copy is kept while it is served
    again = [probability(server, f"many-{number}") for number in (3, 11, 5)]
    assert again == pytest.approx([first[3], first[11], first[5]], abs=1e-5)
    for number in range(12):
        assert remove(server, f"many-{number}").status_code == 200


def test_names_that_are_paths_are_unknown(server):
    for name in ("../llavac", "/etc", "..", "a/b"):
        assert add(server, name=name).status_code == 404
    assert add(server, name="x" * 65).status_code == 400
    assert add(server, name="llavac", path="/tmp").status_code == 400


def test_states_are_in_the_metrics(server):
    assert server.metric("sieve_adapters") >= 2
    text = httpx.get(f"{server.url}/metrics").text
    assert 'model="llavac"' in text
    assert 'state="loaded"' in text

"""`explain`: the kept patches a request says are those it used, and lie where it says they do."""

import asyncio
import functools
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

import patches
from patches.config import Retention, SieveConfig
from patches.selection import SELECTORS, image_seed, num_kept
from serving.__main__ import main
from serving.errors import BadRequestError
from serving.explaining import read_retentions
from serving.geometry import read_processing
from serving.overlay import Tile, contact_sheet, draw_overlay, heat_color
from serving.schema import ImageExplanation
from serving.settings import DEMO
from tests.checkpoints import build_published_like
from tests.pictures import data_url, encoded, noise
from tests.running import RunningServer
from tests.serving.test_app import client, engine  # noqa: F401
from train.reference import Reference

ROOT = Path(__file__).resolve().parents[2]
RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)
CASES = list(itertools.product(RATIOS, SELECTORS))
SIZES = [(336, 336), (112, 112), (640, 480), (480, 641), (90, 900), (31, 30), (70, 200)]


@pytest.fixture(scope="session")
def padding(tmp_path_factory):
    return build_published_like(tmp_path_factory.mktemp("padding") / "base", pad_to_square=True)


@pytest.fixture(scope="module")
def padding_server(padding):
    with RunningServer(model=str(padding), dtype="float32", max_model_len=2600) as server:
        yield server


@pytest.fixture(
    params=[
        "demo",
        "published",
        pytest.param("padding", marks=pytest.mark.long),
        pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.long]),
    ],
    scope="module",
)
def served(request):
    """A server with its checkpoint."""
    server = request.getfixturevalue(f"{request.param}_server")
    is_demo = request.param in ("demo", "ray")
    return server, DEMO / "base" if is_demo else request.getfixturevalue(request.param)


@functools.cache
def reference(folder):
    return Reference(folder)


@pytest.mark.parametrize(("ratio", "selector"), CASES)
def test_kept_patches_and_scores_equal_hugging_faces(served, ratio, selector):
    server, folder = served
    yardstick = reference(folder)
    images = [noise(40, (160, 90)), noise(41, (70, 200))]
    asked = {"retention_ratio": ratio, "selector": selector, "explain": True}
    answer = server.label(image=[data_url(image) for image in images], text="a day", **asked)
    pixels = yardstick.process(images)
    seen = yardstick.see(pixels)
    assert len(answer["explanations"]) == 2
    for index, told in enumerate(answer["explanations"]):
        seed = image_seed(pixels[index])
        kept = yardstick.keep(seen, index, ratio=ratio, selector=selector, seed=seed)
        assert told["kept"] == kept.tolist()
        attention = seen.cls_attention[index]
        assert told["cls_attention"] == pytest.approx(attention.mean(dim=0).tolist(), rel=1e-3)
        if selector == "cls-last":
            last = attention[yardstick.feature_layer].tolist()
            assert told["scores"] == pytest.approx(last, rel=1e-3)
    assert sum(len(told["kept"]) for told in answer["explanations"]) == answer["retention"]["kept"]


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_kept_have_the_highest_scores(served, selector):
    server, _ = served
    asked = {"retention_ratio": 0.3, "selector": selector, "explain": True}
    (told,) = server.label(image=data_url(noise(43)), **asked)["explanations"]
    rows, columns = told["grid"]
    assert rows * columns == len(told["scores"]) == server.labeler.engine.info.num_patches
    rest = set(range(rows * columns)) - set(told["kept"])
    assert min(told["scores"][i] for i in told["kept"]) >= max(told["scores"][i] for i in rest)


def test_explaining_changes_no_answer_and_no_cache(served):
    server, _ = served
    image, other = data_url(noise(4711)), data_url(noise(4712))
    body = {"image": image, "text": "undisturbed", "retention_ratio": 0.8}
    before = server.tower_images()
    explained = server.label(**body, explain=True)
    assert server.tower_images() == before + 2  # one to answer, one to explain
    plain = server.label(**body)
    assert server.tower_images() == before + 2
    assert "explanations" not in plain
    assert "explain" in explained["timing_ms"]
    assert plain["probabilities"] == explained["probabilities"]
    server.label(image=other, text="undisturbed", explain=True)
    assert server.label(**body)["probabilities"] == plain["probabilities"]
    assert server.tower_images() == before + 4  # the first image is still in the cache


def test_a_turned_photograph_is_explained_as_it_is_seen(served):
    server, _ = served
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: 200 wide and 120 high as it is seen
    lying = noise(7, (120, 200))
    turned = data_url(encoded(lying, "JPEG", exif=exif), "JPEG")
    upright = data_url(noise(7, (200, 120)))
    boxes = [
        server.label(image=url, explain=True)["explanations"][0]["box"] for url in (turned, upright)
    ]
    assert boxes[0] == boxes[1]


def test_requests_at_once_are_explained_as_alone(served):
    server, _ = served

    async def ask(http, seed):
        body = {"image": data_url(noise(seed)), "retention_ratio": 0.4, "explain": True}
        return (await http.post("/v1/label", json=body)).json()["explanations"]

    async def together():
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            return await asyncio.gather(*(ask(http, seed) for seed in range(60, 68)))

    alone = [
        server.label(image=data_url(noise(seed)), retention_ratio=0.4, explain=True)
        for seed in range(60, 68)
    ]
    assert asyncio.run(together()) == [answer["explanations"] for answer in alone]


def make_processor(folder, dtype):
    patches.register()
    config = ModelConfig(
        model=str(folder),
        dtype=dtype,
        max_model_len=2048,
        hf_overrides=SieveConfig().hf_overrides(),
    )
    return MULTIMODAL_REGISTRY.create_processor(config)


@pytest.mark.parametrize("mode", ["published", "padding"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tower_looks_at_the_very_pixels_and_seeds_of_the_request(request, mode, dtype):
    processor = make_processor(request.getfixturevalue(mode), dtype)
    images = [noise(seed, size) for seed, size in enumerate(SIZES)]
    retention = Retention(ratio=0.4, selector="random")
    items = processor.info.parse_mm_data({"image": images})
    prompt = [1, *[32000] * len(images), 5]
    asked = processor(prompt, items, hf_processor_mm_kwargs=retention.processor_kwargs())
    seen = processor.look_at(images, retention)
    for index, item in enumerate(asked["mm_kwargs"]["image"]):
        for name in ("pixel_values", "num_kept", "selector", "seed"):
            assert torch.equal(seen[name][index], item[name].data), name
    assert len(set(seen["seed"].tolist())) == len(images)


def ramp(width, height):
    """Red says where a pixel is from left to right, green from top to bottom."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["published", "padding"])
def test_the_box_is_where_hugging_face_took_the_pixels_from(request, mode, size):
    processor = AutoImageProcessor.from_pretrained(request.getfixturevalue(mode))
    (width, height), image = size, ramp(*size)
    seen = processor(images=[image], return_tensors="np")["pixel_values"][0]
    left, top, right, bottom = read_processing(processor.to_dict()).box(*size)
    for channel, (start, end, length) in enumerate([(left, right, width), (top, bottom, height)]):
        shares = seen[channel] * processor.image_std[channel] + processor.image_mean[channel]
        line = shares[168, :] if channel == 0 else shares[:, 168]
        places = start + (np.arange(336) + 0.5) / 336 * (end - start)
        inside = (places > 0.05 * length) & (places < 0.95 * length)
        assert inside.sum() > 20
        expected = (places[inside] - 0.5) / (length - 1)
        assert line[inside] == pytest.approx(expected, abs=0.02)


def test_a_grid_is_inside_where_it_is_cropped_and_around_where_it_is_padded(padding, published):
    boxes = {
        folder: read_processing(AutoImageProcessor.from_pretrained(folder).to_dict()).box(400, 100)
        for folder in (published, padding)
    }
    assert boxes[published] == pytest.approx((150, 0, 250, 100))
    assert boxes[padding] == pytest.approx((0, -150, 400, 250))


def test_an_unknown_resize_is_refused_by_name():
    with pytest.raises(BadRequestError, match="longest_edge") as caught:
        read_processing({"size": {"longest_edge": 336}})
    assert caught.value.param == "explain"


async def test_explain_is_bounded_as_label_is(client):  # noqa: F811
    body = {"image": [data_url(noise())] * 3, "explain": True}
    answer = await client.post("/v1/label", json=body)
    assert answer.status_code == 400
    assert "allowed are 2" in answer.json()["error"]["message"]
    assert (await client.post("/v1/label", json={"explain": "maybe"})).status_code == 400


async def test_without_an_image_there_is_nothing_to_explain(client):  # noqa: F811
    answer = (await client.post("/v1/label", json={"text": "x", "explain": True})).json()
    assert answer["explanations"] == []


async def test_models_say_what_a_request_may_choose(client):  # noqa: F811
    body = (await client.get("/v1/models")).json()
    assert body["selectors"] == list(SELECTORS)
    assert body["patches"] == 64
    for card in body["data"]:
        assert body["label_structures"][card["label_structure"]] == card["fields"]


# The picture


def explanation(kept, box=(0, 0, 80, 80)):
    scores = [float(index + 1) for index in range(16)]
    return ImageExplanation(grid=(4, 4), box=box, scores=scores, cls_attention=scores, kept=kept)


def test_kept_patches_look_as_they_were_and_the_rest_is_dark():
    image = Image.new("RGB", (80, 80), (200, 120, 40))
    picture = draw_overlay(image, explanation([5, 10]), longest=160)
    assert picture.size == (160, 160)
    for index in range(16):
        place = (40 * (index % 4) + 20, 40 * (index // 4) + 20)
        is_lit = picture.getpixel(place) == (200, 120, 40)
        assert is_lit == (index in (5, 10))
        assert is_lit or max(picture.getpixel(place)) < 70
    assert draw_overlay(image, explanation([5]), dims=False, longest=160).getpixel((1, 1)) == (
        200,
        120,
        40,
    )


def test_what_is_cropped_off_is_dark_and_what_is_padded_is_shown():
    wide = Image.new("RGB", (160, 80), (250, 250, 250))
    cropped = draw_overlay(wide, explanation(list(range(16)), (40, 0, 120, 80)), longest=160)
    assert cropped.size == (160, 80)
    assert max(cropped.getpixel((10, 40))) < 80
    assert cropped.getpixel((80, 40)) == (250, 250, 250)
    padded = draw_overlay(wide, explanation(list(range(16)), (0, -40, 160, 120)), longest=160)
    assert padded.size == (160, 160)
    assert padded.getpixel((80, 80)) == (250, 250, 250)


def test_the_map_is_brighter_where_attention_is_higher():
    image = Image.new("RGB", (80, 80), (0, 0, 0))
    picture = draw_overlay(image, explanation([]), dims=False, heat=1.0, longest=160)
    low, high = picture.getpixel((20, 20)), picture.getpixel((140, 140))
    assert sum(low) < sum(high)
    assert high == heat_color(1.0)


def test_a_sheet_has_a_place_for_every_tile():
    tile = Tile(picture=Image.new("RGB", (300, 150), "red"), lines=["name" * 99, "26 of 64"])
    one, four = contact_sheet([tile], 1, side=100), contact_sheet([tile] * 4, 2, side=100)
    assert four.width == 2 * one.width - 20
    assert four.height == 2 * one.height - 20
    reds = (np.asarray(four) == [255, 0, 0]).all(axis=-1).sum()
    assert reds == 4 * 100 * 50


# The command


def test_the_command_draws_what_the_server_kept(demo_server, tmp_path, capsys):
    source = tmp_path / "post.png"
    noise(9, (200, 120)).save(source)
    out = tmp_path / "overlay.png"
    asked = ["explain", str(source), "--server", demo_server.url, "--retention", "0.4"]
    assert main([*asked, "--model", "llavac", "--out", str(out)]) == 0
    body = {"image": data_url(source.read_bytes()), "retention_ratio": 0.4, "model": "llavac"}
    (told,) = demo_server.label(**body, explain=True)["explanations"]
    with Image.open(source) as image:
        expected = draw_overlay(image.convert("RGB"), ImageExplanation(**told))
    with Image.open(out) as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(expected))
    assert f"{num_kept(64, 0.4)} of 64 kept by cls" in capsys.readouterr().out


def test_the_readmes_command_works_as_pasted(demo_server, tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "serving explain" in block]
    command = block.replace("http://127.0.0.1:8000", demo_server.url)
    command = command.replace("/tmp/", f"{tmp_path}/").replace(".venv/bin/python", sys.executable)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "overlay.png") as sheet:
        assert sheet.width == 20 + 4 * 300


@pytest.mark.long
def test_the_command_works_with_an_engine_of_its_own(tmp_path):
    """In a process of its own, as vLLM reads its environment once."""
    noise(9, (200, 120)).save(tmp_path / "post.png")
    out = tmp_path / "overlay.jpg"
    asked = ["explain", tmp_path / "post.png", "--retention", "0.4", "--out", out]
    command = [sys.executable, "-m", "serving", *asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{num_kept(64, 0.4)} of 64 kept by cls" in done.stdout
    with Image.open(out) as picture:
        assert picture.size == (720, 432)


def test_a_folder_gives_a_sheet_and_a_broken_image_is_named(demo_server, tmp_path, capsys):
    folder = tmp_path / "posts"
    folder.mkdir()
    for number in range(3):
        noise(number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no")
    out = tmp_path / "sheet.png"
    asked = ["explain", str(folder), "--server", demo_server.url, "--out", str(out)]
    assert main([*asked, "--retention", "1,0.2"]) == 3
    with Image.open(io.BytesIO(out.read_bytes())) as sheet:
        assert sheet.width == 20 + 2 * 300
    assert "broken.png: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (["missing.png"], "missing.png"),
        (["post.png", "--retention", "2"], "retention"),
        (["post.png", "--retention", "0.4,x"], "retention"),
        (["post.png", "--heat", "3"], "heat"),
        (["post.png", "--out", "x.gif"], ".png"),
        (["post.png", "--out", "no/x.png"], "folder"),
        (["post.png", "--out", "post.png"], "itself"),
        (["empty"], "0 images"),
    ],
)
def test_bad_arguments_say_what_is_allowed(change, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise().save("post.png")
    (tmp_path / "empty").mkdir()
    assert main(["explain", *change]) == 2
    assert word in capsys.readouterr().err


def test_ratios_are_read_between_commas():
    assert read_retentions("1,0.4,.05") == [1.0, 0.4, 0.05]

"""The cost model: bytes, the roofline, and what stands beside it."""

import json

import pytest

from bench.__main__ import main
from bench.cost import costs
from bench.flops import RATIOS, SHAPES, Shape
from bench.outcome import BenchError
from bench.roofline import DEVICES, Device, Request, Work, probe_cpu, shape_of, works
from serving.settings import DEMO
from tests.bench.swept import outcome_by_hand

SEVEN_B = SHAPES["llava-1.5-7b"]


def total_bytes(**sizes):
    return sum(work.bytes for work in works(SEVEN_B, Request(**sizes)))


def test_flops_are_those_of_the_flop_model():
    for ratio in RATIOS:
        found = works(SEVEN_B, Request(ratio=ratio, text_tokens=50, output_tokens=6))
        expected = SEVEN_B.request_flops(ratio, text_tokens=50, output_tokens=6)
        assert sum(work.flops for work in found) == pytest.approx(expected)


def test_one_post_alone_reads_all_weights_of_seven_billion_parameters():
    found = {work.name: work.bytes for work in works(SEVEN_B, Request(ratio=0.05))}
    assert found["prefill"] == pytest.approx(13.2e9, rel=0.06)  # Llama's 6.6e9 products, bf16
    assert found["tower"] == pytest.approx(0.6e9 + 0.75e9, rel=0.25)


def test_posts_of_a_step_share_its_weights_and_not_its_activations():
    alone, shared, many = (total_bytes(ratio=1.0, batch=batch) for batch in (1, 8, 64))
    assert alone > shared > many
    assert alone - shared == pytest.approx(7 / 8 * 2 * 7.05e9, rel=0.05)


def test_fewer_tokens_never_move_more():
    found = [total_bytes(ratio=ratio, batch=16, output_tokens=4) for ratio in RATIOS]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(("flops", "moved", "ms"), [(4e12, 1, 4.0), (1, 2e9, 2.0), (1e12, 3e9, 3)])
def test_a_stage_takes_the_longer_of_computing_and_moving(flops, moved, ms):
    device = Device(name="d", flops_per_s=1e15, bytes_per_s=1e12, source="by hand")
    assert Work(name="w", flops=flops, bytes=moved).ms(device) == pytest.approx(ms)


def test_decoding_one_post_alone_is_bound_by_memory_and_prefilling_it_by_computing():
    found = {w.name: w for w in works(SEVEN_B, Request(ratio=1.0, output_tokens=2))}
    device = DEVICES["h200"]
    decode, prefill = found["decode"], found["prefill"]
    assert decode.ms(device) == pytest.approx(1e3 * decode.bytes / device.bytes_per_s)
    assert prefill.ms(device) == pytest.approx(1e3 * prefill.flops / device.flops_per_s)


def test_posts_a_day_are_a_share_of_what_the_floor_allows():
    sizes = {"text_tokens": 50, "output_tokens": 1, "batch": 32}
    devices = [DEVICES["h200"]]
    half, whole = (
        costs(SEVEN_B, devices, [0.4], efficiency=share, **sizes)["ratios"][0]
        for share in (0.5, 1.0)
    )
    name = DEVICES["h200"].name
    assert whole["posts_per_day"][name] == pytest.approx(86.4e6 / whole["floor_ms"][name])
    assert half["posts_per_day"][name] == pytest.approx(whole["posts_per_day"][name] / 2)


def test_the_demos_sizes_are_read_from_its_config():
    shape = shape_of(DEMO / "base")
    assert (shape.num_patches, shape.layers, shape.width) == (64, 3, 128)
    assert (shape.tower_layers, shape.tower_mlp) == (4, 512)


def test_a_folder_that_is_no_llava_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": {}}')
    with pytest.raises(BenchError, match=r"config\.json"):
        shape_of(tmp_path)


def test_this_machine_is_probed():
    import torch

    threads = torch.get_num_threads()
    found = probe_cpu("float32", 1)
    assert found.flops_per_s > 1e8
    assert found.bytes_per_s > 1e8
    assert "measured" in found.source
    assert torch.get_num_threads() == threads


def test_measured_times_stand_beside_the_floor(tmp_path, capsys):
    outcome = outcome_by_hand()
    (tmp_path / "sweep.json").write_text(json.dumps(outcome.as_json()))
    argv = ["cost", "--model", "demo", "--sweep", str(tmp_path / "sweep.json")]
    assert main([*argv, "--json", str(tmp_path / "cost.json")]) == 0
    found = json.loads((tmp_path / "cost.json").read_text())["results"]["ratios"]
    assert [each["ratio"] for each in found] == [1.0, 0.4]
    assert found[1]["measured_ms"] == pytest.approx(1e3 * 1.2 / 60)
    assert "measured ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--efficiency", "2"], "up to 1"),
        (["--model", "nowhere"], "config.json"),
        (["--sweep", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_counted_is_refused(argv, word, capsys):
    assert main(["cost", *argv]) == 2
    assert word in capsys.readouterr().err


def test_the_larger_shape_costs_more():
    larger = SHAPES["llava-1.5-13b"].request_flops(1.0, text_tokens=50, output_tokens=1)
    assert larger == pytest.approx(
        1.9 * Shape().request_flops(1.0, text_tokens=50, output_tokens=1), rel=0.06
    )

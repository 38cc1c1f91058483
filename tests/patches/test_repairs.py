"""Each repair, against the definition and against what upstream does where upstream is right."""

import inspect
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

from patches import repairs

# Upstream's own source, whether or not the repair already took its place in this process.
UPSTREAM: dict = {"torch": torch}
exec(inspect.getsource(lora_ops), UPSTREAM)


def batch(indices, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = len(indices)
    return (
        torch.randn(rows, 6, generator=generator),
        torch.randn(3, 1, 4, 6, generator=generator),
        torch.randn(rows, 9, generator=generator),
        torch.tensor(indices),
    )


CALLS = {
    "bgmv_shrink": (0.5,),
    "bgmv_expand": (True,),
    "bgmv_expand_slice": (2, 4, True),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("indices", [[0], [2, 2, 2], [0, 1, 2, 1, 0]])
def test_rows_with_adapters_are_as_upstream_computes_them(name, indices):
    inputs, weights, output, rows = batch(indices)
    ours, theirs = output.clone(), output.clone()
    getattr(repairs, name)(inputs, weights, ours, rows, *CALLS[name])
    UPSTREAM[name](inputs, weights, theirs, rows, *CALLS[name])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["bgmv_expand", "bgmv_expand_slice"])
def test_rows_without_adapter_are_left_alone(name):
    inputs, weights, output, rows = batch([-1, 1, -1, 2])
    changed = output.clone()
    getattr(repairs, name)(inputs, weights, changed, rows, *CALLS[name])
    assert torch.equal(changed[[0, 2]], output[[0, 2]])
    assert not torch.equal(changed[[1, 3]], output[[1, 3]])


def test_upstream_still_gives_rows_without_adapter_the_last_one():
    """When this fails, upstream is repaired: remove `lora_rows_on_cpu`."""
    inputs, weights, output, rows = batch([-1])
    changed = output.clone()
    UPSTREAM["bgmv_expand"](inputs, weights, changed, rows, True)
    assert not torch.equal(changed, output)


def test_the_repair_is_in_place_and_may_be_applied_again():
    repairs.apply()
    repairs.apply()
    for name in repairs._BGMV:
        assert getattr(lora_ops, name) is getattr(punica_cpu, name) is getattr(repairs, name)


def test_a_moved_upstream_is_noticed(monkeypatch):
    monkeypatch.setattr(lora_ops, "bgmv_expand", lambda inputs, weights: None)
    with pytest.raises(RuntimeError, match="bgmv_expand changed"):
        repairs.lora_rows_on_cpu()


def stays(connection):
    repairs.end_with_parent()
    connection.send(os.getpid())
    time.sleep(60)


def starts_one(connection):
    multiprocessing.get_context("spawn").Process(target=stays, args=(connection,)).start()
    time.sleep(60)


def test_a_process_ends_soon_after_the_one_that_started_it_was_killed():
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    parent = spawn.Process(target=starts_one, args=(theirs,))
    parent.start()
    child = ours.recv()
    assert is_running(child)
    parent.kill()
    deadline = time.monotonic() + 30
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_watches_in_a_process_that_nobody_started_as_a_worker():
    repairs.end_with_parent()
    assert not [thread for thread in threading.enumerate() if thread.name == repairs._WATCH]


def spelled(ids, tokenizer, restore):
    from vllm.tokenizers import detokenizer_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detokenizer_utils, "_restore_leading_spaces", restore)
        return detokenizer_utils.convert_ids_list_to_tokens(tokenizer, ids)


def upstreams_restore():
    from vllm.tokenizers import detokenizer_utils

    found = detokenizer_utils._restore_leading_spaces
    return getattr(found, "__wrapped__", found)


def test_ids_without_a_token_are_spelled_as_nothing_and_others_as_upstream_does(demo_tokenizer):
    from vllm.tokenizers import detokenizer_utils

    repairs.ids_without_tokens()
    repairs.ids_without_tokens()
    ours = detokenizer_utils._restore_leading_spaces
    known = list(range(3, len(demo_tokenizer)))
    theirs = spelled(known, demo_tokenizer, upstreams_restore())
    assert spelled(known, demo_tokenizer, ours) == theirs
    assert any(token.startswith(" ") for token in theirs)
    assert spelled([len(demo_tokenizer) + 5, 3], demo_tokenizer, ours)[0] == ""


def test_upstream_still_fails_on_ids_without_a_token(demo_tokenizer):
    """When this fails, upstream is repaired: remove `ids_without_tokens`."""
    with pytest.raises(TypeError):
        spelled([len(demo_tokenizer) + 5], demo_tokenizer, upstreams_restore())


def test_messages_arrive_in_order_whether_the_reader_still_spins_or_waits_to_be_told():
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    repairs.waiting_without_spinning()
    repairs.waiting_without_spinning()
    writer = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    joining = threading.Thread(target=reader.wait_until_ready)
    joining.start()
    writer.wait_until_ready()
    joining.join()
    assert reader._spin_condition.busy_loop_s > repairs._SPIN_S
    found = []

    def read():
        while (message := reader.dequeue(indefinite=True)) is not None:
            found.append(message)

    reading = threading.Thread(target=read)
    reading.start()
    for number in range(60):
        if number % 3 == 0:
            time.sleep(4 * repairs._SPIN_S)  # by now the reader waits
        writer.enqueue(number)
    writer.enqueue(None)
    reading.join(timeout=30)
    assert found == list(range(60))
    assert reader._spin_condition.busy_loop_s == repairs._SPIN_S

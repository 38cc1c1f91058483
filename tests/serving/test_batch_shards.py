"""A run's folder: what is journalled stays, one process at a time, a clear end without space."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from serving.batch.outcomes import Failure, Outcome
from serving.batch.shards import Journal, RunFolder
from serving.errors import ConfigError
from tests.serving.batch_stub import ROOT, constant_answer, run_here, write_posts

FAILED = Failure("decode", "it is torn", code="invalid_image").as_dict()


def outcome(index, error=None):
    answers = () if error else (constant_answer(),)
    return Outcome(index=index, id=f"ä {index}\n", answers=answers, error=error)


def test_a_journal_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "0.journal"
    journal = Journal(path)
    for index in range(3):
        journal.add(outcome(index))
    journal.close()
    raw = path.read_bytes()
    for size in range(len(raw) + 1):
        path.write_bytes(raw[:size])
        cut = Journal(path)
        whole = raw[:size].count(b"\n")
        assert cut.outcomes == {index: outcome(index) for index in range(whole)}
        cut.add(outcome(9))
        cut.close()
        again = Journal(path)
        again.close()
        assert again.outcomes == {**cut.outcomes, 9: outcome(9)}


def test_a_journal_forgets_failures_that_are_tried_again_and_nothing_else(tmp_path):
    path = tmp_path / "0.journal"
    journal = Journal(path)
    journal.add(outcome(0, FAILED))
    journal.add(outcome(1))
    journal.add(outcome(2, FAILED))
    journal.close()
    retried = Journal(path, keeps_errors=False)
    assert set(retried.outcomes) == {1}
    retried.add(outcome(2))
    retried.close()
    last = Journal(path)
    last.close()
    assert [last.outcomes[i].error is None for i in (0, 1, 2)] == [False, True, True]


def test_outcomes_survive_the_journal_to_the_last_value():
    whole = Outcome(
        index=7,
        id="a\udcff",
        answers=(constant_answer(num_asked=2), constant_answer(False, version="")),
        known={"mood": "good"},
        review={"text": "é\u2028", "images": ["a.png"]},
        is_repeat=True,
    )
    assert Outcome.from_line(whole.to_line()) == whole
    assert whole.to_line().count("\n") == 1


def test_a_second_process_on_the_same_folder_is_refused(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from serving.batch.shards import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).held():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another run works on it"):
            RunFolder(tmp_path / "out").held().__enter__()
        other.kill()
        other.wait()
        with RunFolder(tmp_path / "out").held():
            pass


def test_trouble_with_the_input_is_not_told_as_trouble_with_the_output(tmp_path):
    with pytest.raises(OSError, match="Input/output"), RunFolder(tmp_path / "out").held():
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_folder_with_files_of_another_origin_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"'mine.txt'.*empty or new folder"):
        RunFolder(tmp_path).check_same({"data": "x"})


def test_another_run_is_refused_with_what_differs(tmp_path):
    folder = RunFolder(tmp_path / "out")
    assert folder.check_same({"data": "x", "ratio": 0.4}) is False
    assert folder.check_same({"data": "x", "ratio": 0.4}) is True
    with pytest.raises(ConfigError, match=r"ratio=0.4, now it is 0.6"):
        folder.check_same({"data": "x", "ratio": 0.6})


@pytest.mark.parametrize("place", ["out", "out/deeper"])
def test_an_output_that_is_a_file_ends_with_2_and_a_reason(tmp_path, place):
    write_posts(tmp_path, 3)
    (tmp_path / "out").write_text("not a folder")
    places, said = (tmp_path / "posts.jsonl", tmp_path / place, tmp_path / "calls"), []
    assert run_here(*places, said=said) == 2
    assert "cannot be written" in said[0]
    assert not (tmp_path / "calls").exists()  # no engine was started for it


@contextmanager
def files_up_to(size):
    """No file of this process may be larger: what a full disk is, for those who are not root."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def full_disk(folder, size):
    """A folder on a file system of so many bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_journal_that_cannot_grow_stays_whole(tmp_path):
    journal = Journal(tmp_path / "0.journal")
    journal.add(outcome(0))
    size = journal.path.stat().st_size
    with files_up_to(size + 20), pytest.raises(ConfigError, match="File too large"):
        journal.add(outcome(1))
    assert journal.path.stat().st_size == size
    journal.add(outcome(1))
    journal.close()
    again = Journal(journal.path)
    again.close()
    assert again.outcomes == {0: outcome(0), 1: outcome(1)}


def check_whole(out, expected):
    rows = {
        kind: [
            json.loads(line)["id"]
            for path in sorted(out.glob(f"{kind}-*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        for kind in ("labels", "errors")
    }
    assert rows["labels"] == [i for i, stage in expected.items() if stage is None]
    assert rows["errors"] == [i for i, stage in expected.items() if stage is not None]


@pytest.mark.parametrize("size", [100, 3_000, 6_000, 9_000])
def test_files_that_cannot_grow_end_it_with_2_and_the_same_command_completes(tmp_path, size):
    expected = write_posts(tmp_path, 90, seed=3)
    places = (tmp_path / "posts.jsonl", tmp_path / "out", tmp_path / "calls")
    flags, said = ["--shard-size", "30"], []
    with files_up_to(size):
        assert run_here(*places, flags, said) == 2
    assert "cannot be written: File too large" in said[0]
    assert run_here(*places, flags) == 3
    check_whole(tmp_path / "out", expected)


@pytest.mark.parametrize("kib", [20, 60, 100])
def test_a_full_disk_ends_it_with_2_and_with_space_the_same_command_completes(tmp_path, kib):
    expected = write_posts(tmp_path, 300, seed=3)
    disk = tmp_path / "disk"
    places = (tmp_path / "posts.jsonl", disk / "out", tmp_path / "calls")
    flags, said = ["--shard-size", "50"], []
    with full_disk(disk, kib * 1024):
        assert run_here(*places, flags, said) == 2
        assert run_here(*places, flags, said) == 2  # still full, still clear
        assert all("cannot be written: No space left on device" in text for text in said)
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        assert run_here(*places, flags) == 3
        check_whole(disk / "out", expected)

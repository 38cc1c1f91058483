"""`python -m serving` as a user starts it, with the README's own examples."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from serving.cli import parse_command, read_settings
from serving.errors import ConfigError
from serving.server import check_model
from serving.settings import Settings
from tests.pictures import data_url, noise

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid):
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True)
    pairs = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()]
    found = {pid}
    while more := {child for child, parent in pairs if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The command, its URL and its log; ended by SIGTERM, with nothing left behind."""
    port = free_port()
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "serving", "--port", str(port), "--retention", "0.8"]
        process = subprocess.Popen(command, cwd=ROOT, stderr=output, stdout=output)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while not is_ready(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        children = descendants(process.pid)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()[-3000:]
        gone_by = time.monotonic() + 10  # children that were signalled may take a moment to end
        while left := [pid for pid in children if is_running(pid)]:
            assert time.monotonic() < gone_by, left
            time.sleep(0.1)
        assert "serving demo on http://127.0.0.1" in log.read_text()
    finally:
        process.kill()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def is_ready(url):
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def in_test(code, url, folder):
    """A README example with this test's server, posts and files."""
    replaced = code.replace("http://127.0.0.1:8000", url).replace("/tmp/", f"{folder}/")
    return replaced.replace(".venv/bin/python", sys.executable)


def run(arguments, code):
    done = subprocess.run([*arguments, code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readmes_examples_work_as_pasted(served, tmp_path):
    posts, curl, label, *_ = readme_blocks("bash")
    (client,) = readme_blocks("python")
    assert "200 posts" in run(["bash", "-c"], in_test(posts, served, tmp_path))
    answer = run(["bash", "-c"], in_test(curl, served, tmp_path))
    assert '"kept":26' in answer.replace(" ", "")
    words, tokens = run([sys.executable, "-c"], in_test(client, served, tmp_path)).rsplit(" ", 1)
    assert set(words.split(", ")) <= {"positive", "neutral", "negative"}
    assert int(tokens) > 26
    summary = run(["bash", "-c"], in_test(label, served, tmp_path))
    assert "200" in summary
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 200


def test_a_flag_reaches_every_process(served):
    body = {"image": data_url(noise()), "text": "x"}
    answer = httpx.post(f"{served}/v1/label", json=body, timeout=60).json()
    assert answer["retention"]["ratio"] == 0.8
    assert answer["retention"]["kept"] == 51


def test_a_client_that_leaves_stops_the_engines_work(served):
    def generated():
        lines = httpx.get(f"{served}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("vllm:generation_tokens_total{")]
        assert found
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 900,
        "stream": True,
        "temperature": 1,
        "logit_bias": {"2": -100},
    }
    start = generated()
    with httpx.stream("POST", f"{served}/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        next(answer.iter_lines())
    time.sleep(2)
    stopped = generated()
    time.sleep(1)
    assert generated() == stopped
    assert stopped - start < 900


def test_posts_are_labelled_by_an_engine_of_its_own(tmp_path):
    run(["bash", "-c"], f"{sys.executable} -m train posts --out {tmp_path}/posts --count 12")
    out = tmp_path / "labels.csv"
    summary = run(
        ["bash", "-c"],
        f"{sys.executable} -m serving label --data {tmp_path}/posts --model llavac "
        f"--retention 0.4 --out {out} --concurrency 4",
    )
    assert "12" in summary
    assert len(out.read_text().splitlines()) == 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retention", "0"], "retention='0'"),
        (["--selector", "best"], "'best' is unknown"),
        (["--port", "99999"], "port='99999'"),
        (["--dtype", "int3"], "dtype='int3'"),
        (["--config", "/no/such.yaml"], "no such file"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_command(arguments)


@pytest.mark.parametrize("kind", ["nothing", "other", "layer"])
def test_a_checkpoint_that_cannot_be_served_is_refused_before_loading(tmp_path, published, kind):
    if kind == "other":
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    elif kind == "layer":
        config = json.loads((published / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -4}))
    with pytest.raises(ConfigError, match="model='.*(cannot be read|'bert' model|=-4 is not)"):
        check_model(str(tmp_path))


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch):
    path = tmp_path / "server.yaml"
    path.write_text("retention: 0.1\nport: 1111\nmax_num_seqs: 3\n")
    monkeypatch.setenv("SIEVE_CONFIG", "")
    monkeypatch.setenv("SIEVE_PORT", "2222")
    monkeypatch.setenv("SIEVE_MAX_NUM_SEQS", "4")
    settings = read_settings({"config": path, "max_num_seqs": "5"})
    assert (settings.retention, settings.port, settings.max_num_seqs) == (0.1, 2222, 5)


def test_an_unknown_key_of_the_file_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "server.yaml"
    path.write_text("retentoin: 0.1\n")
    monkeypatch.setenv("SIEVE_CONFIG", "")
    with pytest.raises(ConfigError, match="retentoin"):
        read_settings({"config": path})


def test_every_setting_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit):
        parse_command(["--help"])
    text = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description


def test_help_starts_without_the_engine():
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "serving", "--help"],
        cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert " vllm" not in done.stderr

import json

import pytest

from serving.errors import ConfigError
from train.__main__ import main
from train.demo import build as build_module
from train.demo.build import Build, build_demo


def test_posts_are_written_in_mvsas_layout(tmp_path, capsys):
    assert main(["posts", "--out", str(tmp_path), "--count", "5", "--balanced"]) == 0
    assert "5 posts" in capsys.readouterr().out
    header, *rows = (tmp_path / "labelResultAll.txt").read_text().splitlines()
    assert header == "ID\ttext,image"
    assert len(rows) == 5
    for row in rows:
        post_id, labels = row.split("\t")
        assert len(labels.split(",")) == 2
        assert (tmp_path / "data" / f"{post_id}.txt").read_text().strip()
        assert (tmp_path / "data" / f"{post_id}.png").stat().st_size > 100


def test_posts_never_overwrite_others(tmp_path, capsys):
    arguments = ["posts", "--out", str(tmp_path), "--count", "1"]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "already has posts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("--split", "validation"), ("--count", "0"), ("--seed", "-1")]
)
def test_a_bad_flag_is_named_with_its_value(tmp_path, capsys, flag, value):
    assert main(["posts", "--out", str(tmp_path / "new"), flag, value]) == 2
    message = capsys.readouterr().err
    assert flag in message
    assert value in message


@pytest.mark.parametrize("arguments", [[], ["demo"], ["posts"]])
def test_help_is_there_for_every_command(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--help"])
    assert "usage: python -m train" in capsys.readouterr().out


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """A build whose stages only write down that they ran."""
    ran: list[str] = []

    def stages(self):
        def stage(name):
            def run(folder):
                ran.append(name)
                if name == "boom" and ran.count("boom") == 1:
                    raise KeyboardInterrupt
                (folder / "file").write_text(name)

            return run

        return {name: stage(name) for name in ("tokenizer", "base", "boom", "adapters/one")}

    monkeypatch.setattr(Build, "_stages", stages)
    monkeypatch.setattr(build_module, "measure_demo", lambda folder, seed: {"adapters": {}})
    monkeypatch.setattr(build_module, "write_manifests", lambda folder, report: None)
    return tmp_path / "demo", ran


def test_a_stopped_build_goes_on_after_its_last_finished_stage(staged):
    out, ran = staged
    with pytest.raises(KeyboardInterrupt):
        build_demo(out, seed=0, fresh=False)
    assert not (out / "base").exists()
    build_demo(out, seed=0, fresh=False)
    assert ran == ["tokenizer", "base", "boom", "boom", "adapters/one"]
    assert (out / "base" / "file").read_text() == "base"
    assert (out / "adapters" / "one" / "file").exists()
    assert not (out / ".build").exists()


def test_a_finished_build_is_kept_unless_asked(staged):
    out, ran = staged
    with pytest.raises(KeyboardInterrupt):
        build_demo(out, seed=0, fresh=False)
    report = build_demo(out, seed=0, fresh=False)
    count = len(ran)
    assert (
        build_demo(out, seed=0, fresh=False)
        == report
        == json.loads((out / "report.json").read_text())
    )
    assert len(ran) == count
    build_demo(out, seed=0, fresh=True)
    assert len(ran) > count


def test_a_stopped_build_is_not_mixed_with_other_settings(staged):
    out, _ = staged
    with pytest.raises(KeyboardInterrupt):
        build_demo(out, seed=0, fresh=False)
    with pytest.raises(ConfigError, match="--fresh"):
        build_demo(out, seed=1, fresh=False)

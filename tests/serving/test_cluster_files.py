"""What runs on a cluster: ray_cluster.yaml, its fake form, kuberay.yaml, Dockerfile, serve.yaml."""

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from tests.setup_files import load

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
SERVE = yaml.safe_load((ROOT / "serving" / "serve.yaml").read_text())
KUBERAY = yaml.safe_load((ROOT / "kuberay.yaml").read_text())
KUBERAY_CLUSTER = KUBERAY["spec"]["rayClusterConfig"]
KUBERAY_SERVE = yaml.safe_load(KUBERAY["spec"]["serveConfigV2"])
DOCKERFILE = (ROOT / "Dockerfile").read_text()
RAY = importlib.metadata.version("ray")


fake = load("fake_cluster")


def validated(config):
    """The cluster file as Ray's launcher and autoscaler read it."""
    config = prepare_config(config)
    validate_config(config)
    return config


# ray_cluster.yaml


def test_ray_accepts_the_cluster_file():
    validated(CLUSTER)


def test_the_check_sees_a_wrong_cluster_file():
    with pytest.raises(Exception, match="min_worker_nodes"):
        validated({**CLUSTER, "min_worker_nodes": 1})


def test_the_head_has_no_gpu_and_workers_start_at_zero():
    types = validated(CLUSTER)["available_node_types"]
    head = types.pop(CLUSTER["head_node_type"])
    assert head["resources"]["GPU"] == 0
    assert all(kind["min_workers"] == 0 for kind in types.values())
    assert all(kind["resources"]["GPU"] > 0 for kind in types.values())


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_every_node_starts_with_token_auth(kind):
    *_, start = CLUSTER[f"{kind}_start_ray_commands"]
    assert re.search(r"\bRAY_AUTH_MODE=token ray start\b", start)
    assert "~/.ray/auth_token" in CLUSTER["file_mounts"]


def test_dashboard_and_api_are_on_loopback():
    assert "--dashboard-host=127.0.0.1" in CLUSTER["head_start_ray_commands"][-1]
    assert SERVE["http_options"]["host"] == "127.0.0.1"


def packages():
    """The folders that the project installs."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return {pattern.rstrip("*") for pattern in found["packages"]["find"]["include"]}


def needed():
    """What setup/install.py reads."""
    return packages() | {"setup", "pyproject.toml", "README.md", "LICENSE"}


def test_nodes_get_every_file_that_the_install_reads():
    mounts = {k: v for k, v in CLUSTER["file_mounts"].items() if "auth_token" not in k}
    assert set(mounts.values()) == needed()
    assert all((ROOT / path).exists() for path in mounts.values())
    assert all(remote.endswith(f"/llava-sieve/{local}") for remote, local in mounts.items())


def test_the_image_gets_every_file_that_the_install_reads():
    copied = re.findall(r"^COPY --chown=sieve (.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert {name for line in copied for name in line.split()} == needed()


@pytest.mark.parametrize("text", ["\n".join(CLUSTER["setup_commands"]), DOCKERFILE])
def test_the_install_is_the_projects_and_holds_ray_at_the_locks_version(text):
    assert "setup/install.py --gpu" in text
    (pattern,) = re.findall(r"grep -oE '(.+?)'", text)
    lock = ROOT / "setup" / "lock.txt"
    found = subprocess.run(["grep", "-oE", pattern, lock], capture_output=True, text=True)
    assert found.stdout == f"ray=={RAY}\n"
    assert re.search(r"PIP_CONSTRAINT=\S*ray-version.txt", text)


def test_the_image_runs_as_a_user_who_is_not_root():
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    assert users
    assert "root" not in users
    (uid,) = re.findall(r"--uid (\d+)", DOCKERFILE)
    groups = [KUBERAY_CLUSTER["headGroupSpec"], *KUBERAY_CLUSTER["workerGroupSpecs"]]
    contexts = [group["template"]["spec"]["securityContext"] for group in groups]
    assert {context["runAsUser"] for context in contexts} == {int(uid)}


# The fake form


def test_ray_accepts_the_fake_form_and_nothing_that_scales_differs():
    real = validated(CLUSTER)
    form = validated(fake.fake_form(CLUSTER, "127.0.0.1:6399"))
    for key in ("max_workers", "upscaling_speed", "idle_timeout_minutes", "head_node_type"):
        assert form[key] == real[key]
    assert form["available_node_types"].keys() == real["available_node_types"].keys()
    for name, kind in form["available_node_types"].items():
        expected = real["available_node_types"][name]
        assert fake.fake_resources(expected["resources"]) == kind["resources"]
        assert kind["min_workers"] == expected["min_workers"]
        assert kind["max_workers"] == expected["max_workers"]


def test_the_fake_head_starts_by_the_files_own_command():
    environment, command = fake.head_command(CLUSTER, "--port=1")
    assert environment == {"RAY_AUTH_MODE": "token"}
    assert command[:3] == ["ray", "start", "--head"]
    assert "--dashboard-host=127.0.0.1" in command
    assert [word for word in command if word.startswith("--port")] == ["--port=1"]
    assert not any("bootstrap" in word for word in command)


# Serve configs


@pytest.mark.parametrize("config", [SERVE, KUBERAY_SERVE], ids=["serve.yaml", "kuberay.yaml"])
def test_serve_accepts_the_config_and_knows_every_key(config):
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    assert application.keys() <= ServeApplicationSchema.model_fields.keys()
    for deployment in application["deployments"]:
        assert deployment.keys() <= DeploymentSchema.model_fields.keys()


def test_an_update_finds_a_free_node():
    args = SERVE["applications"][0]["args"]
    most = int(str(args["replicas"]).split("-")[-1])
    assert most < CLUSTER["max_workers"]


@pytest.mark.parametrize("deployment", ["Engine", "Ingress"])
def test_an_update_starts_the_new_replica_before_the_old_one_stops(deployment):
    deployments = {d["name"]: d for d in SERVE["applications"][0]["deployments"]}
    assert deployments[deployment]["max_surge_percent"] > 0


def test_a_replica_fits_a_worker_and_never_the_head():
    args = SERVE["applications"][0]["args"]
    types = dict(CLUSTER["available_node_types"])
    head = types.pop(CLUSTER["head_node_type"])["resources"]
    assert args["replica_gpus"] > head["GPU"]
    for kind in types.values():
        assert args["replica_gpus"] <= kind["resources"]["GPU"]
        assert args["replica_cpus"] <= kind["resources"]["CPU"]


# kuberay.yaml


def test_kubernetes_runs_the_same_applications():
    assert KUBERAY_SERVE["applications"] == SERVE["applications"]


def test_kubernetes_has_the_same_cluster():
    workers = {k: v for k, v in CLUSTER["available_node_types"].items() if "head" not in k}
    (group,), (kind,) = KUBERAY_CLUSTER["workerGroupSpecs"], workers.values()
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (group["minReplicas"], group["maxReplicas"]) == (0, kind["max_workers"])
    assert int(limits["nvidia.com/gpu"]) == kind["resources"]["GPU"]
    assert int(limits["cpu"]) == kind["resources"]["CPU"]
    idle = KUBERAY_CLUSTER["autoscalerOptions"]["idleTimeoutSeconds"]
    assert idle == 60 * CLUSTER["idle_timeout_minutes"]


def test_kubernetes_scales_with_token_auth_and_a_head_without_gpu():
    assert KUBERAY_CLUSTER["enableInTreeAutoscaling"] is True
    assert KUBERAY_CLUSTER["authOptions"]["mode"] == "token"
    assert KUBERAY_CLUSTER["rayVersion"] == RAY
    head = KUBERAY_CLUSTER["headGroupSpec"]
    assert head["rayStartParams"]["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in str(head)


@pytest.mark.parametrize(
    ("name", "words"), [("Dockerfile", "NOT BUILT HERE"), ("kuberay.yaml", "NOT RUN HERE")]
)
def test_what_was_never_run_says_so_at_its_top(name, words):
    assert words in "".join((ROOT / name).read_text().splitlines()[:4])

"""What cannot be run here is at least read: every file parses, and names only what exists."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pipeline.serving.engine import Engine
from pipeline.serving.metrics import STATUSES, Metrics

DEPLOY = Path(__file__).parents[1] / "deploy"


def metric_names() -> set[str]:
    def load() -> object:
        raise RuntimeError("no model is needed")

    metrics = Metrics(Engine(load, 1, 1))  # type: ignore[arg-type]
    return {sample for family in metrics.registry.collect() for sample in [family.name]}


def test_dashboard_and_alerts_name_metrics_that_exist() -> None:
    names = metric_names()
    text = (DEPLOY / "alerts.yaml").read_text() + (DEPLOY / "grafana/dashboard.json").read_text()
    text += (DEPLOY / "kubernetes/autoscaling.yaml").read_text()
    used = {re.sub("_(total|bucket|count|sum)$", "", name) for name in re.findall(r"toolcaller_\w+", text)}
    assert used <= names
    assert len(used) >= 7


def test_every_fault_of_the_server_is_in_an_alert() -> None:
    """504 was in none. What is wrong with a request is its client's: 4xx, but for a queue that is full."""
    in_alerts = re.findall(r'status=~"([\d|]+)"', (DEPLOY / "alerts.yaml").read_text())
    alerted = {int(status) for each in in_alerts for status in each.split("|")}
    assert alerted == {429, *(status for status in STATUSES if status >= 500)}


def test_every_model_that_an_image_is_built_with_is_sent_to_the_builder() -> None:
    """models/cuda/int8 was ignored, so the documented image for CUDA could not be built."""
    texts = [(DEPLOY / "Dockerfile").read_text(), (DEPLOY.parent / "docs/DEPLOYMENT.md").read_text()]
    models = {model for text in texts for model in re.findall(r"MODEL=(models/[\w/]+)", text)}
    assert models >= {"models/release", "models/cuda/int8"}
    admitted = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert {f"!{model}" for model in models} <= set(admitted)


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: path.name)
def test_yaml_parses(path: Path) -> None:
    assert all(document for document in yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "deploy/Dockerfile"],
        ["kubernetes-validate", "--strict", "deploy/kubernetes/deployment.yaml", "deploy/kubernetes/autoscaling.yaml"],
        ["yamllint", "--strict", "-d", "{extends: relaxed, rules: {line-length: disable}}", "deploy"],
    ],
    ids=lambda command: command[0],
)
def test_linters_find_nothing(command: list[str]) -> None:
    """What cannot be run where this is written: a container, a cluster."""
    program = Path(sys.executable).with_name(command[0])
    run = subprocess.run([program, *command[1:]], cwd=DEPLOY.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_ports_and_paths_agree() -> None:
    fly = tomllib.loads((DEPLOY / "fly.toml").read_text())
    json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    deployment = next(yaml.safe_load_all((DEPLOY / "kubernetes/deployment.yaml").read_text()))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert fly["http_service"]["internal_port"] == container["ports"][0]["containerPort"] == 8080
    assert "serve.port=8080" in dockerfile
    assert container["readinessProbe"]["httpGet"]["path"] == fly["http_service"]["checks"][0]["path"] == "/ready"
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["imagePullPolicy"] == "IfNotPresent"
    assert re.search(r"^USER 10001$", dockerfile, re.M)
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.M):
        for name in source.split():
            assert (DEPLOY.parent / name).exists() or name == "${MODEL}", name

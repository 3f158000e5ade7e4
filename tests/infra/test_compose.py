"""The compose file: the same parts, pinned, closed, and free of secrets."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.registry.announce import PUSHGATEWAY
from tests.infra.rules import SECRET_NAME

REPOSITORY = Path(__file__).resolve().parents[2]
COMPOSE = REPOSITORY / "infra" / "compose"

Document = dict[str, Any]

_REQUIRED = r"\$\{[A-Z0-9_]+:\?[^}]*\}"
"""A variable without which compose refuses to start."""
_IMAGE = re.compile(rf"({_REQUIRED}|[a-z0-9./-]+:[A-Za-z0-9._-]+)@({_REQUIRED}|sha256:[0-9a-f]{{64}})")
_KEYS = {
    "image",
    "user",
    "command",
    "environment",
    "ports",
    "volumes",
    "tmpfs",
    "shm_size",
    "mem_limit",
    "cpus",
    "stop_grace_period",
    "networks",
    "depends_on",
    "healthcheck",
    "restart",
    "read_only",
    "cap_drop",
    "security_opt",
    "pids_limit",
    "logging",
}


@pytest.fixture
def compose() -> Document:
    """To be changed."""
    return yaml.safe_load((COMPOSE / "compose.yaml").read_text())


def broken(compose: Document) -> Iterator[str]:
    """All that breaks a rule, as `rule: service: what`."""
    for name, one in compose["services"].items():
        for key in sorted(set(one) - _KEYS):
            yield f"key: {name}: {key}"
        if not _IMAGE.fullmatch(one["image"]):
            yield f"image: {name}: {one['image']}"
        if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", str(one.get("user", ""))):
            yield f"root: {name}"
        if one.get("read_only") is not True:
            yield f"read-only: {name}"
        if one.get("cap_drop") != ["ALL"] or one.get("security_opt") != ["no-new-privileges:true"]:
            yield f"privileges: {name}"
        if not {"mem_limit", "cpus", "pids_limit"} <= set(one):
            yield f"limits: {name}"
        if "healthcheck" not in one and one["restart"] != "no":
            yield f"health: {name}"
        for port in one.get("ports", []):
            if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", str(port)):
                yield f"port: {name}: {port}"
        for volume in one.get("volumes", []):
            if "docker.sock" in volume:
                yield f"volume: {name}: {volume}"
        for variable, value in one.get("environment", {}).items():
            secret = SECRET_NAME.search(variable) and not variable.endswith("_PATH")
            if secret and not re.fullmatch(rf"{_REQUIRED}|true|false", str(value)):
                yield f"secret: {name}: {variable}"
        for word in one.get("command", []):
            if SECRET_NAME.search(word) or re.search(r"://[^/\s:@]+:[^@\s]+@", word):
                yield f"secret: {name}: {word}"


def test_no_rule_is_broken(compose: Document) -> None:
    assert list(broken(compose)) == []
    assert set(compose["services"]) == {"ray", "mlflow", "s3", "prometheus", "pushgateway", "grafana", "ray-dashboards"}


def _ray(compose: Document) -> Document:
    return compose["services"]["ray"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda c: _ray(c).update(image="docker.io/prom/prometheus:v3.5.0"), "image"),
        (lambda c: _ray(c).update(image="${FLAM_IMAGE:-flam}@${FLAM_DIGEST:?}"), "image"),
        (lambda c: _ray(c).update(image="${FLAM_IMAGE:?}:latest"), "image"),
        (lambda c: _ray(c).update(user="0:0"), "root"),
        (lambda c: _ray(c).pop("user"), "root"),
        (lambda c: _ray(c).update(read_only=False), "read-only"),
        (lambda c: _ray(c).update(cap_drop=[]), "privileges"),
        (lambda c: _ray(c).update(privileged=True), "key"),
        (lambda c: _ray(c).update(network_mode="host"), "key"),
        (lambda c: _ray(c).pop("mem_limit"), "limits"),
        (lambda c: _ray(c).pop("healthcheck"), "health"),
        (lambda c: c["services"]["ray-dashboards"].update(restart="always"), "health"),
        (lambda c: _ray(c).update(ports=["8265:8265"]), "port"),
        (lambda c: _ray(c).update(ports=["0.0.0.0:8265:8265"]), "port"),
        (lambda c: _ray(c)["volumes"].append("/var/run/docker.sock:/var/run/docker.sock"), "volume"),
        (lambda c: _ray(c)["environment"].update(RAY_AUTH_TOKEN="a1b2"), "secret"),
        (lambda c: _ray(c)["environment"].update(AWS_SECRET_ACCESS_KEY="${S3_SECRET_KEY:-minio}"), "secret"),
        (lambda c: _ray(c)["command"].append("--redis-password=x"), "secret"),
        (lambda c: _ray(c)["command"].append("postgresql://mlflow:x@postgresql/mlflow"), "secret"),
    ],
)
def test_rules_find_what_breaks_them(compose: Document, change: Callable[[Document], object], rule: str) -> None:
    before = copy.deepcopy(compose)
    change(compose)
    assert compose != before
    assert {each.partition(":")[0] for each in broken(compose)} == {rule}


def test_parts_find_one_another(compose: Document) -> None:
    services = compose["services"]
    scrapes = yaml.safe_load((REPOSITORY / "infra/monitoring/prometheus.yml").read_text())["scrape_configs"]
    found = {each["job_name"]: each["dns_sd_configs"][0] for each in scrapes if "dns_sd_configs" in each}
    names = {name for each in found.values() for name in each["names"]}
    assert names == set(services["ray"]["networks"]["default"]["aliases"])
    assert f"--metrics-export-port={found['ray']['port']}" in services["ray"]["command"]
    (source,) = yaml.safe_load((REPOSITORY / "infra/monitoring/grafana/datasource.yaml").read_text())["datasources"]
    named = {source["url"], *_addresses(compose)}
    hosts = {re.match(r"http://([a-z0-9.]+):", each)[1] for each in named}  # type: ignore[index]
    assert hosts - {"127.0.0.1", "localhost"} == {"prometheus", "grafana", "pushgateway", "mlflow", "s3"}
    (pushed,) = [each["static_configs"][0]["targets"] for each in scrapes if each["job_name"] == "pushgateway"]
    assert services["ray"]["environment"][PUSHGATEWAY] == f"http://{pushed[0]}"
    assert services["ray"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert "--app-name=basic-auth" in services["mlflow"]["command"]


def _addresses(compose: Document) -> set[str]:
    values = [value for one in compose["services"].values() for value in one.get("environment", {}).values()]
    return {value for value in values if str(value).startswith("http://")}


def test_files_and_volumes_are_there(compose: Document) -> None:
    used = set()
    for one in compose["services"].values():
        for volume in one["volumes"]:
            source = re.sub(_REQUIRED, "VARIABLE", volume).split(":")[0]
            if source.startswith("."):
                assert (COMPOSE / source).is_file(), source
                assert volume.endswith(":ro")
            elif source != "VARIABLE":
                used.add(source)
    assert used == set(compose["volumes"])


def test_the_comment_sets_each_variable(compose: Document) -> None:
    text = (COMPOSE / "compose.yaml").read_text()
    comment = text[: text.index("\nname:")]
    asked = set(re.findall(r"\$\{([A-Z0-9_]+):\?", text))
    assert len(asked) > 10
    assert {name for name in asked if f"{name}=" not in comment} == set()
    assert not re.search(r"\$\{[A-Z0-9_]+(:?-|\})", text), "a variable with a default, or with none and no complaint"


def test_ray_and_mlflow_are_told_what_they_are_told_in_kubernetes(compose: Document) -> None:
    """One environment, as far as it is not about addresses and places."""
    (ray,) = yaml.safe_load_all((REPOSITORY / "infra/kuberay/base/ray.yaml").read_text())
    head = ray["items"][0]["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    (mlflow,) = yaml.safe_load_all((REPOSITORY / "infra/kuberay/base/mlflow.yaml").read_text())
    server = mlflow["spec"]["template"]["spec"]["containers"][0]
    for name, container in (("ray", head), ("mlflow", server)):
        here = compose["services"][name]["environment"]
        fixed = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        for variable, value in fixed.items():
            if variable in here and variable not in ("HOME", "MLFLOW_AUTH_CONFIG_PATH"):
                assert here[variable] == value, variable
        assert {one for one in fixed if one.startswith("AWS_")} <= set(here)


def test_ray_has_the_time_to_end(compose: Document) -> None:
    ray = compose["services"]["ray"]
    assert ray["stop_grace_period"] == "2m"
    for name in ("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S"):
        assert 60 <= float(ray["environment"][name]) <= 100, name


@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
def test_compose_reads_it(tmp_path: Path, compose: Document) -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("docker has no compose here")
    text = (COMPOSE / "compose.yaml").read_text()
    names = sorted(set(re.findall(r"\$\{([A-Z0-9_]+):\?", text)))
    digest = f"sha256:{'a' * 64}"
    values = {name: digest if name.endswith("_DIGEST") else str(tmp_path) for name in names}
    values |= {"FLAM_IMAGE": "example.com/flam", "FLAM_MLFLOW_IMAGE": "example.com/flam-mlflow"}
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    command = ["docker", "compose", "-f", str(COMPOSE / "compose.yaml"), "--env-file"]
    done = subprocess.run(
        [*command, str(tmp_path / "env"), "config"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "env").write_text("")
    refused = subprocess.run([*command, str(tmp_path / "env"), "config"], capture_output=True, timeout=60, check=False)
    assert refused.returncode != 0

"""Alerts and the dashboard: complete, by names of metrics that are really exported, and firing when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
MONITORING = REPOSITORY / "infra" / "monitoring"
_METRIC = re.compile(r"\b(?:(?:ray|autoscaler)_[a-z0-9_]+|flam_(?!run\b)[a-z0-9_]+)|^up\b")
"""What is exported by Ray, what is pushed, and what Prometheus itself knows of each target; `flam_run` is a label."""


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found = json.loads((MONITORING / "grafana" / "flam.json").read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Who asks, and what: of alerts, panels and the dashboard's variables."""
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    dashboard = json.loads((MONITORING / "grafana" / "flam.json").read_text())
    for variable in dashboard["templating"]["list"]:
        yield variable["name"], variable["query"]["query"]


def exported_by_flam() -> set[str]:
    """The gauges that workers and the driver set, and what the gate pushes, as Prometheus sees them."""
    from services.feed import FeedMeters
    from services.feed.spill import SPILLED
    from services.watch.gauges import COLLAPSE, GOODPUT, HEALTH, SPEED, exported

    gauges = [*FeedMeters().take(1.0), SPILLED, *HEALTH, *SPEED, COLLAPSE, GOODPUT]
    return {f"ray_{exported(name)}" for name in gauges} | pushed_by_the_gate()


def pushed_by_the_gate() -> set[str]:
    """By a decision as it is announced."""
    from flam_core.evaluation.stats import Estimate
    from services.registry import announce
    from services.registry.gate import Decision

    decision = Decision(True, "", "2", None, "rollout/psnr@10", Estimate(1.0, None, None, None, 1), ())
    with patch.object(announce, "push_to_gateway") as push:
        assert announce.announce("http://nowhere", "flam-grid", decision) is None
    return {metric.name for metric in push.call_args.kwargs["registry"].collect()}


def exported_by_ray() -> set[str]:
    """Those that Ray's own dashboards ask for."""
    from ray.dashboard.modules.metrics import dashboards

    folder = Path(next(iter(dashboards.__path__)))
    return {name for path in folder.glob("*.py") for name in _METRIC.findall(path.read_text())}


def unknown(query: str) -> set[str]:
    return set(_METRIC.findall(query)) - exported_by_flam() - exported_by_ray() - {"up"}


def test_metrics_are_exported() -> None:
    asked = list(queries())
    assert len(asked) > 12
    assert {(who, name) for who, query in asked for name in unknown(query)} == set()
    assert all(_METRIC.search(query) for _, query in asked)


def test_a_metric_that_nobody_exports_is_found() -> None:
    assert unknown("avg by (flam_run) (ray_flam_speed_data_wait_share) > ray_flam_collapsed") == {"ray_flam_collapsed"}
    assert unknown("flam_collapse + ray_flam_gate_gain") == {"flam_collapse", "ray_flam_gate_gain"}
    assert unknown("flam_gate_promotion == flam_gate_promoted") == {"flam_gate_promotion"}
    assert unknown("ray_object_store_memory + ray_object_store_memory_spilt") == {"ray_object_store_memory_spilt"}


def test_alerts_are_complete() -> None:
    assert {rule["alert"] for rule in alerts()} == {
        "FlamRunStalled",
        "FlamWorkersPending",
        "FlamTargetDown",
        "FlamFeedWait",
        "FlamObjectStoreSpilling",
        "FlamCollapse",
        "FlamGateFailed",
    }
    runbook = (REPOSITORY / "docs" / "operations.md").read_text()
    for rule in alerts():
        assert re.fullmatch(r"\d+m", rule["for"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["runbook_url"].endswith(f"docs/operations.md#{rule['alert'].lower()}")
        assert f"\n### {rule['alert']}\n" in runbook


def test_panels_are_complete() -> None:
    ids = [panel["id"] for panel in json.loads((MONITORING / "grafana" / "flam.json").read_text())["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"prometheus"}
    (source,) = yaml.safe_load((MONITORING / "grafana" / "datasource.yaml").read_text())["datasources"]
    assert source["uid"] == "prometheus"


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads((MONITORING / "grafana" / "flam.json").read_text())["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_what_tells_of_learning_speed_and_the_gate_is_shown() -> None:
    from services.watch.gauges import COLLAPSE, GOODPUT, HEALTH, SPEED, exported

    asked = {name for panel in panels() for target in panel["targets"] for name in _METRIC.findall(target["expr"])}
    shown = {f"ray_{exported(name)}" for name in (*HEALTH, *SPEED, COLLAPSE, GOODPUT)}
    assert shown <= asked
    assert pushed_by_the_gate() - asked == {"flam_gate_decided_seconds"}


def test_prometheus_asks_more_often_than_ray_forgets() -> None:
    """Ray shows a gauge for about 30 s; a scrape that comes more seldom misses log lines."""
    settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert int(settings["global"]["scrape_interval"].removesuffix("s")) <= 15
    assert settings["rule_files"] == ["alerts.yml"]
    (ray,) = [job for job in settings["scrape_configs"] if job["job_name"] == "ray"]
    (found,) = ray["dns_sd_configs"]
    service = next(
        one
        for one in yaml.safe_load_all((REPOSITORY / "infra" / "kuberay" / "base" / "services.yaml").read_text())
        if one["metadata"]["name"] == found["names"][0]
    )
    assert service["spec"]["clusterIP"] == "None", "DNS would tell one address for all nodes"
    assert [port["port"] for port in service["spec"]["ports"]] == [found["port"]]


def test_prometheus_asks_the_heads_other_ports() -> None:
    from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
    from ray.dashboard.consts import DASHBOARD_METRIC_PORT

    settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    asked = {job["job_name"]: job["dns_sd_configs"][0] for job in settings["scrape_configs"] if "dns_sd_configs" in job}
    ports = {"ray-autoscaler": AUTOSCALER_METRIC_PORT, "ray-dashboard": DASHBOARD_METRIC_PORT}
    assert {name: asked[name]["port"] for name in ports} == ports
    (service,) = [
        one
        for one in yaml.safe_load_all((REPOSITORY / "infra" / "kuberay" / "base" / "services.yaml").read_text())
        if one["metadata"]["name"] == "flam-head-metrics"
    ]
    assert all(asked[name]["names"] == ["flam-head-metrics"] for name in ports)
    assert service["spec"]["clusterIP"] == "None"
    assert {port["port"] for port in service["spec"]["ports"]} == set(ports.values())


def test_rays_own_dashboards_are_written(tmp_path: Path) -> None:
    """By the program that Grafana's pod runs before it starts, from the Ray that is installed."""
    program = MONITORING / "grafana" / "export_ray.py"
    subprocess.run([sys.executable, program, tmp_path], check=True, capture_output=True, timeout=120)
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(found) == {"ray-core", "ray-data", "ray-train", "ray-serve"}
    assert len({one["uid"] for one in found.values()} | {"flam"}) == 5
    for dashboard in found.values():
        assert len(dashboard["panels"]) > 10
        assert any(one["type"] == "datasource" for one in dashboard["templating"]["list"])


def test_grafana_reads_the_folders_that_are_filled() -> None:
    providers = yaml.safe_load((MONITORING / "grafana" / "dashboards.yaml").read_text())["providers"]
    folders = {one["options"]["path"] for one in providers}
    (deployment,) = [
        one for one in yaml.safe_load_all((MONITORING / "grafana.yaml").read_text()) if one["kind"] == "Deployment"
    ]
    spec = deployment["spec"]["template"]["spec"]
    mounted = {one["mountPath"] for one in spec["containers"][0]["volumeMounts"]}
    assert folders <= mounted
    (init,) = spec["initContainers"]
    assert init["command"][-1] in folders
    assert init["command"][-2] in {one["mountPath"] for one in init["volumeMounts"]}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed")
@pytest.mark.parametrize(
    "command",
    [["test", "rules", "tests/infra/alerts_test.yml"], ["check", "config", "infra/monitoring/prometheus.yml"]],
)
def test_prometheus_takes_the_rules_and_fires_them(command: list[str]) -> None:
    done = subprocess.run(
        ["promtool", *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed")
def test_prometheus_takes_what_the_panels_ask(tmp_path: Path) -> None:
    asked = [target["expr"].replace("$run", ".*") for panel in panels() for target in panel["targets"]]
    rules = [{"record": f"asked:{at}", "expr": expr} for at, expr in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(asked)} rules found" in done.stdout

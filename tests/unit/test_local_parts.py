"""What a local cluster starts with --metrics, and what its jobs are told of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flam_core.errors import EnvironmentFault
from services.local import parts
from services.local.parts import Layout, parts_of
from services.local.secrets import secrets_of
from services.local.settings import LocalSettings


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Programs that are installed, as far as these tests go."""
    programs = {"prometheus", "prometheus-pushgateway"}
    monkeypatch.setattr(parts.shutil, "which", lambda name: f"/usr/bin/{name}" if name in programs else None)
    return programs


def layout(folder: Path, settings: LocalSettings) -> Layout:
    return Layout(folder, folder, settings.ports(), secrets_of(folder), folder / "ray")


def test_metrics_bring_a_pushgateway_that_jobs_know_and_prometheus_asks(tmp_path: Path, found: set[str]) -> None:
    settings = LocalSettings(metrics=True, pushgateway_port=19091)
    made = {part.name: part for part in parts_of(settings, layout(tmp_path, settings))}
    assert list(made) == ["s3", "mlflow", "ray", "pushgateway", "prometheus"]
    assert "--web.listen-address=127.0.0.1:19091" in made["pushgateway"].command
    assert made["ray"].environment["FLAM_PUSHGATEWAY"] == made["pushgateway"].url == "http://127.0.0.1:19091"
    scrapes = yaml.safe_load((tmp_path / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (pushed,) = [one for one in scrapes if one["job_name"] == "pushgateway"]
    assert pushed["static_configs"] == [{"targets": ["127.0.0.1:19091"]}]
    assert pushed["honor_labels"] is True


def test_without_metrics_there_is_neither(tmp_path: Path, found: set[str]) -> None:
    found.clear()
    settings = LocalSettings()
    made = {part.name: part for part in parts_of(settings, layout(tmp_path, settings))}
    assert list(made) == ["s3", "mlflow", "ray"]
    assert "FLAM_PUSHGATEWAY" not in made["ray"].environment


@pytest.mark.parametrize("program", ["prometheus", "prometheus-pushgateway"])
def test_a_program_that_is_missing_is_named(tmp_path: Path, found: set[str], program: str) -> None:
    found.remove(program)
    settings = LocalSettings(metrics=True)
    with pytest.raises(EnvironmentFault, match=f"no program `{program}`"):
        parts_of(settings, layout(tmp_path, settings))

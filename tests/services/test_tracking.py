"""What a run does when MLflow dies under it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flam_core.errors import EnvironmentFault
from services.registry import register
from services.storage import resolve
from services.tracking.journal import Journal
from services.tracking.run import TrackedRun, open_run
from tests.services.conftest import kill_group, running_mlflow

pytestmark = pytest.mark.timeout(200)


def drain(journal: Journal) -> None:
    journal.log(0, {"loss": 1.0})
    try:
        journal.drain(10)
    finally:
        journal.close()


def test_every_call_to_a_dead_server_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # else each call tries for minutes
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    with running_mlflow(tmp_path) as (tracking, server):
        info = open_run(tracking.uri, "dies", "smoke-1", {"seed": "0"}, {})
        run = TrackedRun(info)
        kill_group(server)
        calls: dict[str, Callable[[], object]] = {
            "journal": lambda: drain(Journal(info, resolve(str(tmp_path / "run")))),
            "summary": lambda: run.summary({"rollout/psnr@1": 20.0}),
            "artifacts": lambda: run.artifacts(folder, "report"),
            "tag": lambda: run.tag({"a": "b"}),
            "finish": lambda: run.finish("FINISHED"),
            "register": lambda: register(info, "flam-dies", folder, np.zeros((1, 2, 8, 8, 3), np.uint8), {}),
            "reopen": lambda: open_run(tracking.uri, "dies", "smoke-1", {}, {}),
        }
        for name, call in calls.items():
            with pytest.raises(EnvironmentFault) as raised:
                call()
            line = str(raised.value)
            assert tracking.uri in line, name
            assert "\n" not in line, name

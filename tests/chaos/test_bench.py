"""`jobs/bench.py chaos`: runs that are killed and resized, beside one that is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.services.conftest import environment, run_job, said

pytestmark = [pytest.mark.chaos, pytest.mark.long, pytest.mark.timeout(900)]


def test_two_kills_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    done = run_job(["bench", "chaos", "--kills", "2", "--json", str(out)], environment(), tmp_path, 800)
    assert done.returncode == 0, said(done)
    result = json.loads(out.read_text())
    assert result["kills"] == 2
    assert result["weights_equal"] is True
    assert result["sample_order_equal"] is True
    assert result["mlflow_duplicates"] == result["mlflow_gaps"] == result["committed_work_lost"] == 0
    parts = [result[f"recovery_{part}_s"] for part in ("detect", "restart", "load", "first_batch", "first_step")]
    assert min(parts) >= 0
    assert result["own_recovery_s"] > 0
    assert "| weights bit-equal to the unbroken run's | yes |" in result["table"]

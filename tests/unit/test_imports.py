"""What a process of a run imports: Ray starts many, at every restart, and each second counts in each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("sklearn", "torchmetrics", "matplotlib")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        pytest.param("services.watch.control", ("torch", "mlflow", "pandas", *HEAVY), id="the actor of a run"),
        pytest.param("services.feed.read", ("torch", "mlflow", *HEAVY), id="a read task"),
        pytest.param("services.training.elastic", ("torch", "mlflow", *HEAVY), id="what plans the feed"),
        pytest.param("services.training.worker", ("mlflow", *HEAVY), id="a worker"),
        pytest.param("services.training.launch", HEAVY, id="the driver"),
        pytest.param("services.player.app", ("torch", "mlflow", *HEAVY), id="what answers HTTP"),
    ],
)
def test_a_process_imports_what_it_uses(module: str, absent: tuple[str, ...]) -> None:
    code = f"import {module}, sys; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

"""The main job learns what it says it learns: the bars that README and devlog claim, with seed 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_tiny_predicts_and_tells_agents_and_their_actions_apart(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "FLAM_"))}

    def run(*words: str) -> None:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    world = ("--option", "agents=3", "--option", "cells=6", "--option", "walls=3")
    run(f"{REPOSITORY}/jobs/ingest.py", "--world", "grid", "--out", "data/grid", "--size", "48", *world)
    run(f"{REPOSITORY}/jobs/train.py", "tiny", "--data", "data/grid", "--seed", "1", "--workers", "2")
    found = json.loads((tmp_path / "outputs/latest/metrics.json").read_text())
    assert found["rollout/psnr@1"] >= found["shuffled/psnr@1"] + 3
    assert found["rollout/psnr@1"] >= found["ceiling/psnr@1"] - 1
    assert found["rollout/psnr@10"] >= found["copy/psnr@10"] + 5
    assert found["rollout/psnr@10"] >= found["ceiling/psnr@10"] - 3
    assert found["dci/i"] >= 0.95  # where each agent is, in the slot that is matched with it
    assert found["action_probe/visible_accuracy"] >= 0.95
    assert found["leakage"] <= 0.05

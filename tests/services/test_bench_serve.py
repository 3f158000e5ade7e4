"""The player's benchmark, at tiny sizes: each kind of step has a row of its own, and each load its percentiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from flam_core.data.ingest import ingest_world
from flam_core.worlds import make_world
from services.bench.serve import ServeBenchSettings, bench_serve
from services.storage import resolve
from tests.services.player_fixture import SIZE, save_small_model


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)  # a player is started twice
def test_every_row_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    location = resolve(str(tmp_path / "grid"))
    world = make_world("grid", frame_size=SIZE, agents=2, cells=4)
    ingest_world(world, location.fs, location.path, episodes=30, frames=16)
    model = save_small_model(tmp_path / "model", 0)
    sizes = ServeBenchSettings(model=str(model), data=str(tmp_path / "grid"), clients=(1, 2), seconds=1.0)
    found = bench_serve(sizes)
    assert set(found["played_frames_per_second"]) == {"code", "arrow", "arrow_with_challenger"}
    assert all(rate > 0 for rate in found["played_frames_per_second"].values())
    for kind in ("rollout", "infer"):
        assert set(found[kind]) == {"1_clients", "2_clients"}
        for row in found[kind].values():
            assert row["requests_per_second"] > 0
            assert 0 < row["p50_ms"] <= row["p99_ms"]

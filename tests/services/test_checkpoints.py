"""Checkpoints in a folder: commit, keeping, the best, and saving beside the training."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flam_core.errors import DataError, EnvironmentFault
from flam_core.learning.state import TrainState
from services.storage import Location, resolve
from services.training import checkpoints
from tests.services.fault_proxy import FaultProxy, running_proxy


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return resolve(tmp_path)


def state(step: int, size: int = 10) -> TrainState:
    return TrainState(b"m" * size, b"o%d" % step, b"mean" if step % 2 else None, {"step": step})


def steps(run: Location) -> set[int]:
    return {int(path.name[5:]) for path in Path(run.path, "checkpoints").iterdir() if path.is_dir()}


def test_the_newest_and_the_best_are_kept(run: Location) -> None:
    for step, score in ((1, 20.0), (2, 30.0), (3, None), (4, 25.0), (5, None), (6, 30.0)):
        checkpoints.save(run, state(step), keep=2, score=score)
        assert checkpoints.newest(run) == state(step)
    assert steps(run) == {2, 5, 6}  # a later one that is as good is no better
    checkpoints.save(run, state(7), keep=1, score=31.0)
    assert steps(run) == {7}


def test_what_a_killed_save_left_is_cleared_by_the_next(run: Location) -> None:
    """Deleted but not forgotten, and written but not committed."""
    for step in (1, 2):
        checkpoints.save(run, state(step))
    index = Path(run.path, "checkpoints/index.json")
    before = index.read_text()
    checkpoints.save(run, state(3))
    index.write_text(json.dumps(json.loads(before) | {"steps": [1, 2, 3]}))
    assert checkpoints.newest_step(run) == 3
    checkpoints.save(run, state(4))
    assert steps(run) == {3, 4}
    index.write_text(before)
    assert checkpoints.newest(run) is None  # both are gone, and the run starts anew rather than from half of one


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"steps": 3, "best": null}', '{"steps": []}', "{"])
def test_a_damaged_index_is_one_clear_error(run: Location, content: str) -> None:
    checkpoints.save(run, state(1))
    Path(run.path, "checkpoints/index.json").write_text(content)
    with pytest.raises(DataError, match="does not name a run's checkpoints"):
        checkpoints.newest(run)


def test_training_goes_on_while_a_checkpoint_is_written(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time: the next waits for the one before."""
    gate, written = threading.Event(), []
    real = checkpoints.save

    def slow(run: Location, state: TrainState, *, keep: int, score: float | None) -> None:
        gate.wait(20)
        real(run, state, keep=keep, score=score)
        written.append(state.meta["step"])

    monkeypatch.setattr(checkpoints, "save", slow)
    writer = checkpoints.Writer(run, keep=2)
    writer.save(state(1))
    assert (written, writer.committed, checkpoints.newest(run)) == ([], 0, None)
    second = threading.Thread(target=writer.save, args=(state(2),))
    second.start()
    time.sleep(0.05)
    assert second.is_alive()
    gate.set()
    second.join(20)
    writer.wait()
    assert (written, writer.committed) == ([1, 2], 2)
    assert checkpoints.newest(run) == state(2)
    assert writer.seconds > 0


def test_a_save_that_fails_is_raised_by_the_next_call(run: Location) -> None:
    """A disk that takes nothing: here, a file where the folder should be."""
    checkpoints.save(run, state(1))
    Path(run.path, "checkpoints/step-00000002").write_text("in the way")
    writer = checkpoints.Writer(run, keep=2)
    writer.save(state(2))
    with pytest.raises((EnvironmentFault, OSError)):
        writer.wait()
    writer.wait()  # once
    assert checkpoints.newest(run) == state(1)  # what was committed is still there


# In a bucket


@pytest.fixture
def proxy(s3_server: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the session's S3 server; a request has one second and a half."""
    with running_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setenv("FLAM_STORAGE_RETRY_SECONDS", "1.5")
        yield running


def test_an_upload_that_is_cut_anywhere_costs_no_committed_step(
    proxy: FaultProxy, s3_server: Callable[[], str]
) -> None:
    """The connection breaks at the first, the second, ... object of a checkpoint and stays broken."""
    run = resolve(f"s3://{s3_server()}/runs/a")
    checkpoints.save(run, state(1))
    cuts, step = 0, 1
    while True:
        proxy.clear()
        proxy.script(*[""] * cuts, method="PUT")
        proxy.always("reset", method="PUT")
        try:
            checkpoints.save(run, state(step + 1))
        except EnvironmentFault:
            proxy.clear()
            # Clearing away the oldest comes after the commit, so then the new one is there.
            assert checkpoints.newest(run) in (state(step), state(step + 1)), f"cut after {cuts} objects"
            if cuts < 4:
                assert checkpoints.newest(run) == state(step)  # at least four objects make a commit
            checkpoints.save(run, state(step + 1))  # by the process that goes on
            assert checkpoints.newest(run) == state(step + 1)
            cuts, step = cuts + 1, step + 1
        else:
            break
    assert cuts >= 5  # model, optimiser, mean or meta, COMMIT, index

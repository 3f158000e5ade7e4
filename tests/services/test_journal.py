"""What is logged is in MLflow exactly once, whatever dies in between."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flam_core.errors import DataError, EnvironmentFault
from services.storage import Location, resolve
from services.tracking.journal import Journal, segments
from services.tracking.run import open_run
from services.tracking.server import RunInfo
from tests.services.conftest import Tracking, environment, free_ports, kill_group, running_mlflow

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def run(tmp_path: Path) -> Location:
    """An empty folder of a run."""
    return resolve(str(tmp_path / "run"))


def opened(tracking: Tracking, tmp_path: Path) -> RunInfo:
    return open_run(tracking.uri, "journal", tmp_path.name, {"seed": "0"}, {})


def history(tracking: Tracking, info: RunInfo) -> dict[str, list[tuple[int, float]]]:
    return tracking.history(tracking.client.get_run(info.run_id))


def log(journal: Journal, steps: range) -> None:
    for step in steps:
        journal.log(step, {"loss": 1 / (step + 1), "rollout/psnr@1": float(step)})


def test_all_of_it_arrives_once(mlflow_server: Tracking, run: Location, tmp_path: Path) -> None:
    info = opened(mlflow_server, tmp_path)
    journal = Journal(info, run, interval=0.05)
    log(journal, range(0, 700))  # more than one call of MLflow's takes
    journal.tag({"finding.silent": "step 3: said"})
    journal.drain(60)
    journal.close()
    points = history(mlflow_server, info)
    assert points["progress/step"] == [(step, float(step)) for step in range(700)]
    assert points["rollout/psnr_at_1"] == [(step, float(step)) for step in range(700)]
    assert [step for step, _ in points["loss"]] == list(range(700))
    assert mlflow_server.client.get_run(info.run_id).data.tags["finding.silent"] == "step 3: said"


def test_a_resumed_run_takes_no_step_twice(mlflow_server: Tracking, run: Location, tmp_path: Path) -> None:
    info = opened(mlflow_server, tmp_path)
    first = Journal(info, run)
    log(first, range(0, 10))
    first.drain(60)
    first.close()
    second = Journal(info, run)
    assert second.last_step == 9
    second.log(9, {"loss": 77.0})
    log(second, range(5, 15))
    second.drain(60)
    second.close()
    points = history(mlflow_server, info)["loss"]
    assert points == [(step, 1 / (step + 1)) for step in range(15)]


def test_sent_again_is_not_there_again(mlflow_server: Tracking, run: Location, tmp_path: Path) -> None:
    """Killed after MLflow took a segment, before the journal knew: it is sent again."""
    info = opened(mlflow_server, tmp_path)
    journal = Journal(info, run)
    log(journal, range(0, 10))
    journal.drain(60)
    journal.close()
    run.fs.delete_file((run / "journal" / "cursor.json").path)
    again = Journal(info, run)
    log(again, range(10, 12))  # partly new
    again.drain(60)
    again.close()
    assert [step for step, _ in history(mlflow_server, info)["loss"]] == list(range(12))


def test_an_outage_holds_nothing_up_and_loses_nothing(
    run: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (port,) = free_ports(1)
    with running_mlflow(tmp_path, port) as (tracking, server):
        info = opened(tracking, tmp_path)
        journal = Journal(info, run, interval=0.05)
        log(journal, range(0, 5))
        journal.drain(60)
        kill_group(server)
    begun = time.monotonic()
    log(journal, range(5, 25))
    journal.sync()
    assert time.monotonic() - begun < 5  # files alone
    with pytest.raises(EnvironmentFault, match=str(port)):
        journal.drain(2)
    assert [line.step for _, lines in segments(run) for line in lines] == list(range(25))
    with running_mlflow(tmp_path, port) as (tracking, _):
        log(journal, range(25, 30))
        journal.drain(100)
        journal.close()
        assert [step for step, _ in history(tracking, info)["loss"]] == list(range(30))
    said = capsys.readouterr().out
    assert said.count("warning: MLflow at") == 1  # not once a try
    assert "is back" in said


def test_a_run_without_its_folder_does_not_log_its_steps_again(
    mlflow_server: Tracking, run: Location, tmp_path: Path
) -> None:
    info = opened(mlflow_server, tmp_path)
    journal = Journal(info, run)
    log(journal, range(0, 4))
    journal.drain(60)
    journal.close()
    elsewhere = Journal(opened(mlflow_server, tmp_path), resolve(str(tmp_path / "another")))
    log(elsewhere, range(0, 6))
    elsewhere.drain(60)
    elsewhere.close()
    assert [step for step, _ in history(mlflow_server, info)["loss"]] == list(range(6))


def test_tags_alone_do_not_hide_the_newest_step(mlflow_server: Tracking, run: Location, tmp_path: Path) -> None:
    info = opened(mlflow_server, tmp_path)
    journal = Journal(info, run)
    log(journal, range(0, 4))
    journal.sync()
    journal.tag({"a": "b"})
    journal.drain(60)
    journal.close()
    assert len(list(segments(run))) == 2
    again = Journal(info, run)
    assert again.last_step == 3
    again.close()


def test_a_segment_that_is_none_is_named(mlflow_server: Tracking, run: Location, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "journal"
    folder.mkdir(parents=True)
    (folder / "00000001.jsonl").write_text("loss 1.0\n")
    with pytest.raises(DataError, match="00000001"):
        Journal(opened(mlflow_server, tmp_path), run)


def test_in_a_bucket(mlflow_server: Tracking, s3_server: Callable[[], str], tmp_path: Path) -> None:
    info = opened(mlflow_server, tmp_path)
    place = resolve(f"s3://{s3_server()}/runs/one")
    for last in (3, 6):
        journal = Journal(info, place)
        log(journal, range(0, last))
        journal.drain(60)
        journal.close()
    assert [step for step, _ in history(mlflow_server, info)["loss"]] == list(range(6))


_LOGS = """
import sys, time
from services.storage import resolve
from services.tracking.journal import Journal
from services.tracking.server import RunInfo
info, run = RunInfo(*sys.argv[1:5]), resolve(sys.argv[5])
journal = Journal(info, run, interval=0.02)
begin = journal.last_step + 1
print("begins", flush=True)
for step in range(begin, 3000):
    journal.log(step, {"loss": float(step)})
    time.sleep(0.002)
journal.drain(60)
"""


def test_killed_again_and_again(mlflow_server: Tracking, run: Location, tmp_path: Path) -> None:
    """kill -9 wherever it happens to be, ten times; what was not synced is logged again, as a resumed run would."""
    info = opened(mlflow_server, tmp_path)
    words = [info.tracking_uri, info.experiment, info.run_id, info.name, run.uri]
    for number in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", _LOGS, *words],
            env=environment() | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        time.sleep(0.05 + 0.11 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
    journal = Journal(info, run)
    written = journal.last_step
    journal.drain(60)
    journal.close()
    assert written > 0
    assert history(mlflow_server, info)["loss"] == [(step, float(step)) for step in range(written + 1)]
    cursor = json.loads((tmp_path / "run" / "journal" / "cursor.json").read_text())
    assert cursor == {"segments": len(list(segments(run)))}

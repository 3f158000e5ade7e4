"""Who stands still, where the time went, and who holds a run: the parts that need no cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flam_core.errors import DataError, EnvironmentFault, SettingsError, TrainingFailed
from services.storage import resolve, write_bytes
from services.training.chaos import Fault, parse_chaos
from services.training.elastic import parse_workers
from services.training.skipped import AT_MOST, Spoilt, read_spoilt, record_spoilt
from services.watch import BUCKETS, Beat, Goodput, Lease, Spans, Stage, find_stall, held, merged

HERE = Beat(
    rank=0,
    world=2,
    node="n0",
    host="h0",
    pid=10,
    process_started=1.0,
    step=7,
    stage="forward",
    stage_seconds=1.0,
    median_step_seconds=0.5,
)


def beats(*stages: tuple[int, Stage, float]) -> dict[int, Beat]:
    """Of ranks 0, 1, ...: step, stage and for how long."""
    return {
        rank: replace(HERE, rank=rank, pid=10 + rank, step=step, stage=stage, stage_seconds=seconds)
        for rank, (step, stage, seconds) in enumerate(stages)
    }


def quiet(known: dict[int, Beat], seconds: float = 0.5) -> dict[int, float]:
    return dict.fromkeys(known, seconds)


# Stalls


def test_steps_that_go_on_are_no_stall() -> None:
    known = beats((7, "backward", 59.0), (7, "forward", 3.0))
    assert find_stall(known, quiet(known), 60.0) is None


def test_the_one_furthest_behind_is_to_blame() -> None:
    known = beats((8, "backward", 61.0), (8, "data", 62.0))
    stall = find_stall(known, quiet(known), 60.0)
    assert stall is not None
    assert stall.beat.rank == 1
    assert stall.sentence("a.parquet") == (
        "rank 1 of 2 (pid 11 on h0) has been in stage data of step 8 for 62 s, which reads a.parquet"
    )


def test_of_two_at_the_same_place_the_one_that_waits_for_none_is_to_blame() -> None:
    known = beats((8, "forward", 61.5), (8, "forward", 61.0))
    stall = find_stall(known, quiet(known), 60.0)
    assert stall is not None
    stacks = {0: 'File "torch/nn/parallel/distributed.py", line 1', 1: 'File "mine.py", line 1'}
    assert stall.blame(stacks).beat.rank == 1
    assert stall.blame({0: stacks[1], 1: stacks[0]}).beat.rank == 0
    assert stall.blame({}).beat.rank == 0


def test_slow_steps_have_more_patience() -> None:
    known = {rank: replace(beat, median_step_seconds=10.0) for rank, beat in beats((7, "data", 150.0)).items()}
    assert find_stall(known, quiet(known), 60.0) is None
    late = {rank: replace(beat, stage_seconds=201.0) for rank, beat in known.items()}
    assert find_stall(late, quiet(late), 60.0) is not None


def test_what_takes_long_by_nature_has_more_patience() -> None:
    for stage in ("load", "start", "evaluation", "checkpoint"):
        known = beats((7, stage, 120.0), (8, "backward", 120.0))
        assert find_stall(known, quiet(known), 60.0) is None, stage


def test_a_rank_that_answers_no_more_is_to_blame() -> None:
    known = beats((7, "backward", 10.0), (7, "optimiser", 2.0))
    stall = find_stall(known, {0: 1.0, 1: 75.0}, 60.0)
    assert stall is not None
    assert (stall.beat.rank, stall.answers) == (1, False)
    assert "has not answered for 75 s, after stage optimiser of step 7" in stall.sentence("")


def test_who_is_done_is_not_waited_for() -> None:
    known = beats((9, "end", 500.0), (9, "end", 500.0))
    assert find_stall(known, quiet(known, 500.0), 60.0) is None
    assert find_stall({}, {}, 60.0) is None


# The ledger


def test_every_second_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("services.watch.goodput.time.time", lambda: now[0])
    ledger = Goodput(resolve(str(tmp_path)), started=1000.0)
    now[0] = 1040.0  # 30 s until there are workers, of whose 10 s
    ledger.hear(replace(HERE, seconds={"start_up": 6.0, "productive": 4.0}))
    now[0] = 1060.0
    ledger.hear(replace(HERE, seconds={"start_up": 6.0, "productive": 20.0, "data_wait": 4.0}))
    now[0] = 1080.0  # they were killed; the next are there, and begin with what was done before
    ledger.hear(replace(HERE, pid=99, seconds={"start_up": 5.0, "recompute": 3.0}))
    totals = ledger.totals()
    assert totals["start_up"] == 36.0
    assert (totals["productive"], totals["data_wait"], totals["recompute"]) == (20.0, 4.0, 3.0)
    assert totals["restart"] == 17.0  # 12 s without workers, 5 s in which these began
    assert sum(totals.values()) == 80.0
    now[0] = 1090.0
    ledger.hear(replace(HERE, pid=99, seconds={"start_up": 5.0, "recompute": 3.0, "productive": 10.0}))
    now[0] = 1092.0
    ledger.training_ended()
    now[0] = 1100.0
    ledger.end()
    totals = ledger.totals()
    assert (totals["start_up"], totals["evaluation"], totals["productive"]) == (38.0, 8.0, 30.0)
    assert sum(totals.values()) == 100.0
    assert ledger.now.restarts == 1


def test_a_ledger_goes_on_where_the_last_attempt_ended(tmp_path: Path) -> None:
    run = resolve(str(tmp_path))
    first = Goodput(run)
    first.hear(replace(HERE, seconds={"productive": 20.0}))
    first.furthest, first.step_seconds, first.spans = 41, 0.25, ["a.jsonl"]
    first.save()  # as of one that is killed now
    second = Goodput(run)
    assert (second.furthest, second.step_seconds, second.spans) == (41, 0.25, ["a.jsonl"])
    second.hear(replace(HERE, pid=5, seconds={"productive": 10.0}))
    assert second.totals()["productive"] == 30.0
    assert second.metrics()["goodput/attempts"] == 2
    assert sum(value for key, value in second.metrics().items() if key.endswith("_share")) == pytest.approx(1.0)
    assert set(second.totals()) == set(BUCKETS)


def test_a_ledger_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "goodput.json").write_text("[]")
    with pytest.raises(DataError, match=r"goodput\.json"):
        Goodput(resolve(str(tmp_path)))


def test_spans_keep_what_matters_and_open_as_a_trace(tmp_path: Path) -> None:
    run = resolve(str(tmp_path))
    spans = Spans(run, rank=3)
    for step in range(1000):
        spans.add("data", step, 0.001)
        spans.add("forward", step, 5.0 if step == 777 else 0.01)
    spans.add("checkpoint", 1000, 0.5)
    spans.flush()
    events = json.loads(merged(run, [spans.name, "gone.jsonl"]))["traceEvents"]
    shown = {event["args"]["step"] for event in events if event["name"] == "forward"}
    assert set(range(100)) < shown
    assert {777, 950} < shown
    assert len(shown) < 130
    assert [event["dur"] for event in events if event["name"] == "checkpoint"] == [500_000]
    assert {event["pid"] for event in events} == {3}


def test_how_a_worker_began_is_kept_once_a_step_is_done(tmp_path: Path) -> None:
    run = resolve(str(tmp_path))
    spans = Spans(run, rank=0)
    place = tmp_path / "spans" / spans.name
    spans.add("start", 7, 3.0)
    spans.add("forward", 7, 0.1)
    spans.flush_if_due()
    assert not place.exists()
    spans.add("data", 8, 0.0)
    spans.flush_if_due()
    assert [json.loads(line)["name"] for line in place.read_text().splitlines()] == ["start", "forward", "data"]


# The lease


def test_a_run_has_one_driver(tmp_path: Path) -> None:
    run = resolve(str(tmp_path))
    lease = Lease(run)
    lease.take("smoke-1")
    assert held(run)
    with pytest.raises(EnvironmentFault, match=f"smoke-1 is running already: pid {os.getpid()}"):
        Lease(run).take("smoke-1")
    lease.release()
    assert not held(run)
    Lease(run).take("smoke-1")


def test_the_lease_of_a_dead_driver_on_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    take = "import sys; from services.storage import resolve; from services.watch import Lease; " + (
        "Lease(resolve(sys.argv[1])).take('smoke-1')"
    )
    repository = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", take, str(tmp_path)], check=True, cwd=repository)
    run = resolve(str(tmp_path))
    assert (tmp_path / "lease.json").exists()
    assert not held(run)
    began = time.monotonic()
    Lease(run).take("smoke-1")
    assert time.monotonic() - began < 5


def test_a_pid_that_was_given_away_again_holds_nothing(tmp_path: Path) -> None:
    run = resolve(str(tmp_path))
    lease = Lease(run)
    lease.take("smoke-1")
    content = json.loads((tmp_path / "lease.json").read_text())
    content["process_started"] = psutil.Process().create_time() - 1000
    (tmp_path / "lease.json").write_text(json.dumps(content))
    assert not held(run)
    Lease(run).take("smoke-1")


@pytest.mark.timeout(120)
def test_a_lease_from_elsewhere_counts_while_it_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.watch.lease.RENEW_SECONDS", 1.0)
    run = resolve(str(tmp_path))
    holder = {"token": "other", "host": "elsewhere/1", "pid": 1, "process_started": 0.0, "renewed": 1}
    write_bytes(run / "lease.json", json.dumps(holder).encode())
    assert held(run)
    Lease(run).take("smoke-1")  # nobody renews it
    write_bytes(run / "lease.json", json.dumps(holder).encode())
    renew = (
        "import json, sys, time\nplace = sys.argv[1]\n"
        "for n in range(2, 40):\n time.sleep(0.3)\n old = json.load(open(place))\n old['renewed'] = n\n"
        " open(place + '.new', 'w').write(json.dumps(old))\n import os; os.replace(place + '.new', place)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", renew, str(tmp_path / "lease.json")])
    try:
        with pytest.raises(EnvironmentFault, match="on elsewhere holds"):
            Lease(run).take("smoke-1")
    finally:
        other.kill()
        other.wait()


# Settings


def test_faults_are_read_as_they_are_written() -> None:
    found = parse_chaos("kill:1@40, hang@5,slow:0,s3-503,mlflow-down,corrupt-checkpoint@9,sigterm@3,node-loss,nan@2")
    assert [one.fault for one in found] == [
        Fault.KILL,
        Fault.HANG,
        Fault.SLOW,
        Fault.S3_503,
        Fault.MLFLOW_DOWN,
        Fault.CORRUPT_CHECKPOINT,
        Fault.SIGTERM,
        Fault.NODE_LOSS,
        Fault.NAN,
    ]
    assert (found[0].rank, found[0].step, found[0].name) == (1, 40, "kill:1@40")
    assert parse_chaos("") == ()


@pytest.mark.parametrize("text", ["kil:0@4", "kill@4", "slow", "kill:a@4", "kill:0@", "kill:0@4 hang@5", "hang@-1"])
def test_what_is_no_fault_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match="--chaos"):
        parse_chaos(text)


@given(st.integers(1, 99), st.integers(0, 99))
def test_workers_are_a_number_or_a_range(least: int, more: int) -> None:
    found = parse_workers(f"{least}:{least + more}")
    assert (found.least, found.most, found.elastic) == (least, least + more, more > 0)
    assert parse_workers(str(least)).for_ray() == least


@pytest.mark.parametrize("text", ["0", "3:2", "two", "2-8", "2:", ":8", "-1", "1.5"])
def test_what_is_no_number_of_workers_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="workers"):
        parse_workers(text)


def test_what_spoils_too_often_ends_the_run(tmp_path: Path) -> None:
    run = resolve(str(tmp_path))
    for number in range(AT_MOST):
        record_spoilt(run, Spoilt([number], f"step {number}: leapt"))
    assert [one.steps for one in read_spoilt(run)] == [[0], [1], [2]]
    with pytest.raises(TrainingFailed, match="step 0: leapt; step 1: leapt; step 2: leapt"):
        record_spoilt(run, Spoilt([9], "step 9: leapt"))
    assert asdict(read_spoilt(run)[-1]) == {"steps": [2], "why": "step 2: leapt"}

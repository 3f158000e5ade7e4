"""What kills cost a run, and what the service costs one that is not killed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flam_core.errors import TrainingFailed
from services.tracking.run import logged_steps
from services.training.job import FAILURES

_REPOSITORY = Path(__file__).resolve().parents[2]
_STEPS, _EVERY, _LOGGED = 250, 10, 50
_WORLD = ("--world", "grid", "--size", "48", "--episodes", "40", "--frames", "64", "--option", "agents=3")
_STOPPED = 75


@dataclass(frozen=True)
class ChaosBenchSettings:
    """What `jobs/bench.py chaos` takes."""

    kills: int = 20
    """SIGKILLs of the worker at random steps of a run of 250."""
    seed: int = 0
    """Of these steps."""


@dataclass(frozen=True)
class _Ran:
    """A run of `jobs/train.py smoke` that ended."""

    folder: Path
    """Of the run."""
    tracking: str
    said: str

    @property
    def weights(self) -> str:
        return hashlib.sha256((self.folder / "model" / "model.safetensors").read_bytes()).hexdigest()

    @property
    def consumed(self) -> str:
        meta = self.folder / "checkpoints" / f"step-{_STEPS:08d}" / "meta.json"
        return json.loads(meta.read_text())["consumed"]

    @property
    def steps(self) -> list[int]:
        """That MLflow has, each as often as it has it."""
        return logged_steps(self.tracking, "flam", self.folder.name)


def bench_chaos(settings: ChaosBenchSettings) -> dict[str, Any]:
    """Kill a run again and again, and resize another; compare both with one that was left alone.

    Gives the keys of docs/reliability.md. Raises TrainingFailed if a run does not come to its end.
    """
    steps = sorted(random.Random(settings.seed).sample(range(3, _STEPS - 3), settings.kills))
    with tempfile.TemporaryDirectory(prefix="flam-chaos-") as name:
        place = Path(name)
        data = place / "grid"
        _program(place, ["ingest", *_WORLD, "--out", str(data)])
        print("a run that is left alone", flush=True)
        alone = _run(place / "alone", data)
        print(f"a run that is killed {settings.kills} times", flush=True)
        killed = _run(place / "killed", data, "--chaos", ",".join(f"kill:0@{step}" for step in steps))
        print("a run on one worker, on two, and on one again", flush=True)
        for workers in ("1", "2"):
            more = ("--chaos", "sigterm@80,sigterm@160", "--workers", workers, "--worker_cpus", "0.5")
            _program(place / "sizes", _train(data, *more), exit_code=_STOPPED)
        sizes = _run(place / "sizes", data, "--chaos", "sigterm@80,sigterm@160")
        wanted = list(range(_LOGGED, _STEPS + 1, _LOGGED))
        ledger = json.loads((killed.folder / "goodput.json").read_text())["attempts"][-1]
        result = {
            "kills": killed.said.count("chaos: kill"),
            "weights_equal": killed.weights == alone.weights,
            "sample_order_equal": killed.consumed == alone.consumed == sizes.consumed,
            "loss_ratio_after_resizes": _last_loss(sizes) / _last_loss(alone),
            "mlflow_duplicates": sum(len(one.steps) - len(set(one.steps)) for one in (killed, sizes)),
            "mlflow_gaps": sum(len(set(wanted) - set(one.steps)) for one in (killed, sizes)),
            "committed_work_lost": _committed_lost(killed.said),
            **_recovery(killed.folder),
            "goodput": {bucket: round(seconds, 1) for bucket, seconds in ledger["seconds"].items()},
            "steps": _STEPS,
            "checkpoint_every": _EVERY,
        }
    return {**result, "table": _table(result)}


def _table(result: dict[str, Any]) -> str:
    """What docs/reliability.md shows, as Markdown."""
    rows = {
        "kills (SIGKILL at random steps)": result["kills"],
        "weights bit-equal to the unbroken run's": result["weights_equal"],
        "sample order equal, also on 1, 2 and 1 workers": result["sample_order_equal"],
        "loss after 1, 2 and 1 workers, over the unbroken run's": f"{result['loss_ratio_after_resizes']:.3f}",
        "steps that MLflow has twice": result["mlflow_duplicates"],
        "steps that MLflow lacks": result["mlflow_gaps"],
        "committed steps lost": result["committed_work_lost"],
        **{f"recovery: {text}": f"{result[f'recovery_{part}_s']:.2f} s" for part, text in _PARTS.items()},
        "recovery, all of it": f"{result['recovery_s']:.2f} s",
        "recovery, flam's own (load and first step)": f"{result['own_recovery_s']:.2f} s",
    }
    words = {True: "yes", False: "no"}
    lines = [f"| {name} | {words[value] if isinstance(value, bool) else value} |" for name, value in rows.items()]
    return "\n".join(["| what | measured |", "|---|---|", *lines])


def _run(folder: Path, data: Path, *more: str) -> _Ran:
    said = _program(folder, _train(data, *more))
    (run,) = (folder / "outputs").glob("smoke-*")
    return _Ran(run, f"sqlite:///{folder / 'mlflow.db'}", said)


def _train(data: Path, *more: str) -> list[str]:
    steps = ("--flam_stage.steps", str(_STEPS - 20), "--checkpoint_every", str(_EVERY))
    return ["train", "smoke", "--data", str(data), *steps, *more]


def _program(folder: Path, words: Sequence[str], *, exit_code: int = 0) -> str:
    """Run a program of flam to its end; what it printed. Raises TrainingFailed if it ends otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(_REPOSITORY / "jobs" / f"{words[0]}.py"), *words[1:]]
    ours = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    environment = ours | {"FLAM_HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != exit_code:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise TrainingFailed(
            f"jobs/{words[0]}.py ended with {done.returncode} instead of {exit_code}: {last}", fix="Run it by itself."
        )
    return done.stdout


def _committed_lost(said: str) -> int:
    """Steps of checkpoints that were committed before a kill and not resumed from."""
    lost, newest = 0, 0
    for word, number in re.findall(r"(committed step|resumed at step) (\d+)", said):
        if word == "committed step":
            newest = int(number)
        else:
            lost += max(0, newest - int(number))
    return lost


def _last_loss(ran: _Ran) -> float:
    *_, last = re.findall(rf"step {_STEPS}/{_STEPS}  loss ([\d.]+)", ran.said)
    return float(last)


def _recovery(run: Path) -> dict[str, float]:
    """Medians over the kills, in seconds: until Ray Train notices, until the next workers have been started and have
    imported everything, until they have their weights, until the first batch (Ray Data starts meanwhile), and the first
    step. `own_recovery_s` is what of it is flam's own: load and first step."""
    noticed = sorted(json.loads(place.read_text())["time"] for place in (run / FAILURES).iterdir())
    lives = [_life(place) for place in (run / "spans").iterdir()]
    kills = sorted(place.stat().st_mtime for place in (run / "chaos").iterdir())
    parts: dict[str, list[float]] = {part: [] for part in _PARTS}
    for kill, following in zip(kills, [*kills[1:], math.inf], strict=True):
        # A worker that is killed within a second of its first step leaves no spans.
        life = next((one for one in lives if kill < one["load"][0] < following and "optimiser" in one), None)
        if life is None:
            continue
        detected = min(moment for moment in noticed if moment > kill)
        begun, load = life["load"]
        step = sum(life[stage][1] for stage in ("forward", "backward", "optimiser"))
        values = (detected - kill, begun - detected, load, life["start"][1], step)
        for part, value in zip(_PARTS, values, strict=True):
            parts[part].append(value)
    if not parts["load"]:
        raise TrainingFailed("no restarted worker lived for long enough to be measured", fix="Take fewer --kills.")
    whole = [sum(values) for values in zip(*parts.values(), strict=True)]
    own = [load + step for load, step in zip(parts["load"], parts["first_step"], strict=True)]
    return {
        **{f"recovery_{part}_s": statistics.median(values) for part, values in parts.items()},
        "recovery_s": statistics.median(whole),
        "recoveries_measured": len(whole),
        "own_recovery_s": statistics.median(own),
    }


def _life(spans: Path) -> dict[str, tuple[float, float]]:
    """When a worker first did what, and for how long, in seconds."""
    events = [json.loads(line) for line in spans.read_text().splitlines()]
    return {event["name"]: (event["ts"] / 1e6, event["dur"] / 1e6) for event in reversed(events)}


_PARTS = {
    "detect": "until Ray Train notices",
    "restart": "until the next worker's process is there with all that it imports",
    "load": "until it has its weights",
    "first_batch": "until it has its first batch (Ray Data starts)",
    "first_step": "its first step",
}

"""A trial as Ray Tune sees it: a trainable that watches over the trial's own process.

The process is a run like any other (feed, journal, checkpoints, watch), on the same cluster. What it says of held-out
clips is read from its journal and handed to Tune, which may stop it; it then commits a checkpoint and ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from flam_core.errors import DataError, EnvironmentFault, FlamError, SettingsError, pack
from flam_core.learning.collapse import FindingName
from services.storage import Location, read_bytes, resolve, write_bytes
from services.sweep.process import RUN, Spec
from services.sweep.trials import Look
from services.tracking.journal import Line, segments
from services.tracking.server import unnamed

STEP, SCORE = "flam_step", "flam_score"
"""Of a result: steps of stage 2, and what trials are compared by."""
FATAL = (
    FindingName.TOKENIZER_DEAD,
    FindingName.POSTERIOR_COLLAPSE,
    FindingName.IDLE_ACTIONS,
    FindingName.CODEBOOK_COLLAPSE,
    FindingName.DIVERGING,
)
"""What ends a trial. A plateau may be left late, and one slot that takes all may still be the best there is."""
_ALIVE_SECONDS = 5.0
"""Between results that say nothing but that the trial goes on: Tune can stop it only between results."""
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 60.0
_ENDED, _STOPPED = 0, 75
_OF_ALL_TRIALS: dict[int, type[FlamError]] = {2: SettingsError, 3: EnvironmentFault, 4: DataError}
"""Exit codes of what no other trial could do better."""
_TRIES = 3
"""How often a process may be killed from outside, as by the kernel for memory, before the trial counts as failed."""
_DURING = "during/"


@dataclass(frozen=True)
class TrialJob:
    """What the trial's actor is given."""

    name: str
    spec: Spec
    score: str
    """The metric that trials are compared by."""
    stop_collapsed: bool

    def to_json(self) -> str:
        """`from_json` reads it."""
        return json.dumps({**vars(self), "spec": self.spec.to_json()})

    @staticmethod
    def from_json(text: str) -> TrialJob:
        """What `to_json` gave."""
        values = json.loads(text)
        return TrialJob(**{**values, "spec": Spec.from_json(values["spec"])})


def job_place(sweep: Location, name: str) -> Location:
    """Where the driver puts a trial's job for its actor."""
    return sweep / "jobs" / f"{name}.json"


class TrialActor(tune.Trainable):
    """Results: `STEP`, `SCORE` and `look` (all metrics) of each look at held-out clips; `done` with the last, and then
    either `metrics` (it came to its end), `collapsed` (a finding's name), `failed` (why), or `refused` (what is wrong
    beyond this trial)."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the process."""
        self._sweep = resolve(config["sweep"], check=False)
        self._job = TrialJob.from_json(read_bytes(job_place(self._sweep, config["trial"])).decode())
        self._runs = resolve(self._job.spec.settings.storage, check=False)
        self._here = Path(tempfile.mkdtemp(prefix="flam-trial-"))
        (self._here / "spec.json").write_text(self._job.spec.to_json())
        self._tries = 0
        self._segment = 1
        self._looks: deque[Look] = deque()
        self._collapsed = ""
        self._process = self._start()

    def step(self) -> dict[str, Any]:
        """Wait for news, but not for long."""
        deadline = time.monotonic() + _ALIVE_SECONDS
        while True:
            code = self._process.poll()  # before the journal is read: then that is whole
            self._read()
            if self._looks:
                look = self._looks.popleft()
                score = look.metrics.get(self._job.score)
                return self._result({STEP: look.step, "look": dict(look.metrics)} | ({SCORE: score} if score else {}))
            if self._collapsed:
                self._stop()
                return self._result({"done": True, "collapsed": self._collapsed})
            if code is not None and (ended := self._ended(code)) is not None:
                self._keep_log()
                return self._result({"done": True, **ended})
            if time.monotonic() > deadline:
                return self._result({})
            time.sleep(_LOOK_SECONDS)

    def cleanup(self) -> None:
        """Tune stops the trial, or it has ended."""
        self._stop()
        self._keep_log()

    def _keep_log(self) -> None:
        log = self._here / "log.txt"
        write_bytes(self._sweep / "logs" / f"{self._job.name}.txt", log.read_bytes() if log.exists() else b"")

    def _start(self) -> subprocess.Popen[bytes]:
        self._tries += 1
        command = [sys.executable, "-m", "services.sweep.process"]
        arguments = ["--spec", str(self._here / "spec.json"), "--parent", str(os.getpid())]
        with (self._here / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [*command, *arguments], cwd=Path(__file__).parents[2], stdout=log, stderr=subprocess.STDOUT
            )

    def _stop(self) -> None:
        """Have the process commit and end."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ended(self, code: int) -> dict[str, Any] | None:
        """What the process's exit code means; None if it was started again."""
        if code == _ENDED:
            return {"metrics": json.loads(read_bytes(self._run / "metrics.json"))}
        if code < 0 or code == _STOPPED:
            if self._tries < _TRIES:
                self._process = self._start()
                return None
            return {"failed": f"its process was ended {self._tries} times by somebody else (exit {code})"}
        said = self._last_error()
        return {"refused": pack(_OF_ALL_TRIALS[code](said))} if code in _OF_ALL_TRIALS else {"failed": said}

    def _last_error(self) -> str:
        lines = (self._here / "log.txt").read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("flam: error: ")]
        return (errors or lines or ["it said nothing"])[-1].removeprefix("flam: error: ")

    @property
    def _run(self) -> Location:
        return self._runs / (self._here / RUN).read_text()

    def _read(self) -> None:
        """What is new in the run's journal."""
        if not (self._here / RUN).exists():
            return
        try:
            for number, lines in segments(self._run, self._segment):
                self._segment = number + 1
                for line in lines:
                    self._take(line)
        except EnvironmentFault as away:
            print(f"{self._job.name}: its journal cannot be read now: {away}", flush=True)

    def _take(self, line: Line) -> None:
        found = {key.removeprefix(_DURING): value for key, value in line.metrics.items() if key.startswith(_DURING)}
        if line.step is not None and found:
            speed = {key: value for key, value in line.metrics.items() if key == "speed/frames_per_second"}
            # The tokenizer is given, so the run's steps are those of stage 2.
            self._looks.append(Look(line.step, unnamed(found) | speed))
        if self._job.stop_collapsed:
            names = [name for name in FATAL if f"finding.{name}" in line.tags]
            self._collapsed = self._collapsed or (names[0].value if names else "")

    def _result(self, values: dict[str, Any]) -> dict[str, Any]:
        run = self._here / RUN
        return {"trial": self._job.name, "run_id": run.read_text() if run.exists() else "", **values}

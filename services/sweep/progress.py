"""How a sweep stands: a table on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from services.sweep.prepare import Sweep
from services.sweep.recorder import Notes, Recorder
from services.sweep.search import StudySearch
from services.sweep.trials import Record

_LINE_SECONDS = 60.0


class Progress:
    """Shows a sweep while it runs. Call it when there may be something new; `close` it at the end."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._before: int | None = None
        """Trials that were done when this driver began."""
        self._said: set[str] = set()
        self._line_at = 0.0
        self._live = Live(console=Console(), refresh_per_second=1) if sys.stdout.isatty() else None
        if self._live is not None:
            self._live.start()

    def __call__(self, sweep: Sweep, search: StudySearch, recorder: Recorder) -> None:
        """How it stands now."""
        if self._before is None:
            self._before = len(search.records)
            self._said = set(search.records)
        if self._live is not None:
            self._live.update(self._table(sweep, search, recorder))
            return
        for name, record in search.records.items():
            if name not in self._said:
                self._said.add(name)
                print(f"{name}: {said(record, sweep)}", flush=True)
        if time.monotonic() - self._line_at > _LINE_SECONDS:
            self._line_at = time.monotonic()
            print(self._line(sweep, search, recorder), flush=True)

    def close(self) -> None:
        """Leave the last picture as it is."""
        if self._live is not None:
            self._live.stop()

    def _line(self, sweep: Sweep, search: StudySearch, recorder: Recorder) -> str:
        running = [
            f"{trial.name} at {recorder.notes.get(tune_id, Notes()).step}/{sweep.base.flam_stage.steps}"
            for tune_id, trial in search.running.items()
        ]
        done, left = len(search.records), self._left(sweep, search, recorder)
        return f"{done} of {sweep.total} trials done, {len(running)} running: {', '.join(running) or 'none'}{left}"

    def _left(self, sweep: Sweep, search: StudySearch, recorder: Recorder) -> str:
        """By what this driver's trials took so far."""
        steps = sweep.base.flam_stage.steps
        under_way = sum(recorder.notes.get(tune_id, Notes()).step / steps for tune_id in search.running)
        done = len(search.records) - (self._before or 0) + under_way
        if done < 0.1:
            return ""
        left = (sweep.total - len(search.records) - under_way) * (time.monotonic() - self._begun) / done
        return f"; about {left / 60:.0f} min left"

    def _table(self, sweep: Sweep, search: StudySearch, recorder: Recorder) -> Table:
        title = f"{len(search.records)} of {sweep.total} trials done{self._left(sweep, search, recorder)}"
        table = Table("trial", "step", sweep.goals[0].title, "how", title=title, title_justify="left")
        for name, record in search.records.items():
            value = record.metrics.get(sweep.goals[0].metric)
            shown = "" if value is None else f"{value:.2f}"
            table.add_row(name, str(record.steps), shown, record.stopped_by or "finished")
        for tune_id, trial in search.running.items():
            notes = recorder.notes.get(tune_id, Notes())
            value = notes.looks[-1].metrics.get(sweep.goals[0].metric) if notes.looks else None
            table.add_row(trial.name, str(notes.step), "" if value is None else f"{value:.2f}", "running")
        return table


def said(record: Record, sweep: Sweep) -> str:
    """How a trial ended, in a line."""
    goal = sweep.goals[0]
    value = record.metrics.get(goal.metric)
    shown = "" if value is None else f", {goal.title} {value:.2f}"
    how = "finished" if record.stopped_by is None else f"stopped by {record.stopped_by} at step {record.steps}"
    return f"{how if not record.failed else record.stopped_by}{shown}, {record.seconds / 60:.1f} min"

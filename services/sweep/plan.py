"""What a sweep will take: its trials with their sizes, and the time that is left."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from flam_core.config import Config
from flam_core.learning.cost import TIMED_STEPS, step_flops, step_seconds
from flam_core.variants import dynamics_weights
from services.console import table
from services.sweep.prepare import Sweep
from services.sweep.run import local_room
from services.sweep.space import Point
from services.sweep.trials import Record

_TOO_SLOW_FLOPS = 2e12
"""Of a step, above which this machine's CPU is not what the sweep will run on, nor worth timing."""


@dataclass(frozen=True)
class Cost:
    """Of a trial of a point."""

    weights: int
    """Of stage 2."""
    flops: float
    """Of a step on the whole batch, forward and backward."""


def show_plan(sweep: Sweep) -> None:
    """Print the trials, what each costs, which are done, and how long the rest will take, as far as that is known."""
    costs = {point: _cost(sweep.base, point) for point in sweep.points}
    records = {trial: sweep.record(trial) for trial in sweep.trials}
    rows = {}
    for point in sweep.points:
        mine = [records[trial] for trial in sweep.trials if trial.point == point]
        done = sum(record is not None for record in mine)
        rows[point.name] = (
            f"{sweep.settings.seeds} seed(s), {done} done;  {costs[point].weights / 1e6:.2f} M weights,  "
            f"{costs[point].flops / 1e9:.1f} GFLOP a step"
        )
    if sweep.settings.search == "tpe":
        rows["of these"] = f"TPE tries {sweep.settings.points} points"
    rows["tokenizers"] = ", ".join(sweep.tokenizer_runs.values())
    rows["steps of a trial"] = f"{sweep.base.flam_stage.steps}, measured every {sweep.base.evaluation.during[0][1]}"
    rows["compared by"] = ", ".join(f"{goal.title} ({goal.direction})" for goal in sweep.goals)
    rows["left"] = _left(sweep, costs, list(records.values()))
    rows["folder"] = str(sweep.folder)
    table(f"sweep {sweep.name}: {sweep.total} trials", rows)


def _cost(base: Config, point: Point) -> Cost:
    config = point.config(base, base.seed)
    weights = dynamics_weights(config.model, config.tokenizer)
    return Cost(weights, step_flops(config, 1, torch.device("cpu")))


def _left(sweep: Sweep, costs: dict[Point, Cost], records: list[Record | None]) -> str:
    """In words: by the trials that are done; without any, by some steps on this machine if the sweep runs here."""
    steps = sweep.base.flam_stage.steps
    mean = sum(cost.flops for cost in costs.values()) / len(costs)
    to_do = sweep.total - sum(record is not None for record in records)
    at_a_time = sweep.settings.at_a_time or local_room(sweep)
    done = [record for record in records if record is not None and record.steps and record.seconds]
    if done:
        seconds = sum(record.seconds / record.steps for record in done) / len(done) * steps
        how = f"by the {len(done)} trials that are done"
    else:
        here = sweep.training.address is None and not sweep.training.gpu and "RAY_ADDRESS" not in os.environ
        least = min(costs, key=lambda point: costs[point].flops)
        if not here or costs[least].flops > _TOO_SLOW_FLOPS:
            return f"{to_do} trials; how long they take is not known before one is done on that hardware"
        timed = step_seconds(least.config(sweep.base, sweep.base.seed), 1, max(1, (os.cpu_count() or 1) // at_a_time))
        seconds = timed * mean / costs[least].flops * steps
        how = f"by {TIMED_STEPS} steps on this machine: {timed:.2f} s each with {costs[least].flops / 1e9:.1f} GFLOP"
    hours = to_do * seconds / at_a_time / 3600
    return f"{to_do} trials, {at_a_time} at a time, {seconds / 60:.0f} min each: about {hours:.1f} h, {how}"

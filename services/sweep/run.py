"""The driver of a sweep: identity, tokenizers, cluster, Ray Tune, MLflow's parent run, results."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune

from flam_core.errors import DataError, EnvironmentFault, SettingsError, Stopped, TrainingFailed
from flam_core.saved_model import WEIGHTS
from services.registry import nominate
from services.storage import exists, write_bytes
from services.sweep.actor import TrialActor, TrialJob, job_place
from services.sweep.analysis import best_trial
from services.sweep.halving import scheduler
from services.sweep.prepare import Sweep
from services.sweep.process import RUN, Spec
from services.sweep.recorder import Hopeless, Recorder
from services.sweep.report import Report, write_report
from services.sweep.results import results
from services.sweep.search import StudySearch, open_study
from services.sweep.space import Levels
from services.sweep.trials import Trial
from services.tracking.run import TrackedRun, open_run
from services.tracking.server import RunInfo, check_server, default_tracking_uri
from services.training.cluster import FEED_CPUS, connect
from services.training.data import parse_data
from services.training.elastic import parse_workers
from services.training.lineage import git_commit
from services.training.prepare import at_home, home
from services.training.settings import TrainSettings
from services.watch import Lease

_ACTOR_CPUS = 0.01
_LOOK_SECONDS = 1.0
_PROCESS_CPUS = 0.5
"""Of a trial, beside its workers and its feed: Ray Train's controller and others that are rarely busy."""
_PROCESS_BYTES, _WORKER_BYTES = 3 << 29, 1 << 30
"""What a small trial's processes take, and each of its workers."""

Show = Callable[[Sweep, StudySearch, Recorder], None]
"""Is called when there is something new to show."""


def run_sweep(sweep: Sweep, show: Show) -> Report:
    """Train what is not trained yet, and report.

    Raises Stopped if it was told to stop, FlamError for what stands in the way of all trials.
    """
    tracking_uri = sweep.training.tracking or default_tracking_uri(home())
    check_server(tracking_uri)
    started = connect(_room(sweep))
    lease = Lease(sweep.folder)
    try:
        at_a_time = _at_a_time(sweep)
        lease.take(sweep.name)
        parent = _open_parent(sweep, tracking_uri)
        tracked = TrackedRun(parent)
        try:
            with _heeding_sigterm() as stopped:
                for levels in sweep.tokenizer_runs:
                    _train_tokenizer(sweep, levels, parent, lease)
                search = _run_trials(sweep, parent, at_a_time, show, lease)
            if not search.finished:
                why = f" ({stopped[0]})" if stopped else ""
                raise Stopped(
                    f"sweep {sweep.name} was stopped{why}: {len(search.records)} of {sweep.total} trials are done",
                    fix="The same command goes on from there.",
                )
            found = results(sweep, search.records)
            report = write_report(sweep, found)
            tracked.tag(report.tags | _nominated(sweep, parent, found))
            tracked.text(report.page, "report/report.html")
            tracked.text(report.content, "report/sweep.json")
        except BaseException as error:
            with suppress(EnvironmentFault):  # MLflow may be what failed: the first error is the one to show
                tracked.finish("KILLED" if isinstance(error, KeyboardInterrupt | Stopped) else "FAILED")
            raise
        tracked.finish("FINISHED")
    finally:
        lease.release()
        if started:
            ray.shutdown()
    return report


def _nominated(sweep: Sweep, parent: RunInfo, found: Mapping[str, Any]) -> dict[str, str]:
    """Make the best trial's model the candidate: each trial made its own so when it ended."""
    winner = best_trial(found)
    if winner is None or not sweep.training.register:
        return {}
    name = f"flam-{sweep.data_name}"
    version = nominate(parent.tracking_uri, name, winner["run"])
    return {} if version is None else {"candidate": f"models:/{name}/{version}"}


def _run_trials(sweep: Sweep, parent: RunInfo, at_a_time: int, show: Show, lease: Lease) -> StudySearch:
    """Until all have ended, or Tune is interrupted."""
    storage = sweep.settings.optuna or f"sqlite:///{home() / 'optuna.db'}"
    study = open_study(storage, sweep.name, sweep.settings, sweep.space, sweep.base, sweep.goals)
    address = ray.get_runtime_context().gcs_address

    def say() -> None:
        lease.renew_if_due()
        show(sweep, search, recorder)

    def make(trial: Trial) -> dict[str, Any]:
        tokenizer = (sweep.storage / sweep.tokenizer_runs[trial.point.fsq]).uri
        settings = _child_settings(sweep, address, parent, at_a_time, tokenizer_from=tokenizer)
        spec = Spec(trial.config(sweep.base), settings)
        job = TrialJob(trial.name, spec, sweep.goals[0].metric, sweep.settings.stop_collapsed)
        write_bytes(job_place(sweep.folder, trial.name), job.to_json().encode())
        return {"trial": trial.name, "sweep": sweep.folder.uri}

    steps = sweep.base.flam_stage.steps
    recorder = Recorder(sweep.folder, sweep.storage, steps, say)
    search = StudySearch(
        study, sweep.settings, sweep.space, sweep.base, sweep.goals, sweep.record, make, recorder.ended
    )
    asha = scheduler(sweep.settings, steps, sweep.goals[0].metric, search.records.values())
    recorder.stopped = asha.stopped
    _quiet_tune()
    tuner = tune.Tuner(
        tune.with_resources(TrialActor, {"cpu": _ACTOR_CPUS}),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=asha,
            num_samples=-1,
            max_concurrent_trials=at_a_time,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            # What Tune itself writes down is not needed to go on, but it asks for a place that all nodes see.
            name=f"attempt-{int(time.time())}",
            storage_filesystem=sweep.folder.fs,
            storage_path=(sweep.folder / "tune").path,
            callbacks=[recorder],
            stop=Hopeless(recorder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=2),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # runs keep their own
        ),
    )
    tuner.fit()
    if recorder.refused is not None:
        raise recorder.refused
    if recorder.crashed:
        raise TrainingFailed(
            f"the watch over a trial ended: {recorder.crashed}", fix="The same command goes on; --debug shows more."
        )
    return search


def _child_settings(
    sweep: Sweep, address: str, parent: RunInfo, at_a_time: int, *, tokenizer_from: str | None
) -> TrainSettings:
    """Of a run of the sweep: on its cluster, below its MLflow run, with its share of the machine."""
    training = sweep.training
    local = training.address is None and os.environ.get("RAY_ADDRESS") is None
    threads = training.threads
    if not threads and local:
        threads = max(1, (os.cpu_count() or 1) // (at_a_time * parse_workers(training.workers).most))
    return replace(
        training,
        data=",".join(f"{at_home(place)}@{weight:g}" for place, weight in parse_data(training.data)),
        storage=sweep.storage.uri,
        tracking=parent.tracking_uri,
        address=address,
        tokenizer_from=tokenizer_from,
        parent=parent.run_id,
        register=training.register and tokenizer_from is not None,
        threads=threads,
        verify=False,  # the sweep has, once for all
        feed_cpus=training.feed_cpus or _feed_cpus(sweep, at_a_time),
    )


def _feed_cpus(sweep: Sweep, at_a_time: int) -> float:
    """A trial's share of the CPUs that all workers leave."""
    taken = at_a_time * (_worker_cpus(sweep) + _PROCESS_CPUS)
    return max(FEED_CPUS, (ray.cluster_resources().get("CPU", 0) - taken) / at_a_time)


def _train_tokenizer(sweep: Sweep, levels: Levels, parent: RunInfo, lease: Lease) -> None:
    """Train the tokenizer of a setting, unless that is done: in a process of its own, as trials are."""
    run = sweep.storage / sweep.tokenizer_runs[levels]
    if exists(run / "model" / WEIGHTS):
        return
    print(f"tokenizer {'x'.join(map(str, levels))}: run {sweep.tokenizer_runs[levels]}", flush=True)
    config = sweep.tokenizer_config(levels)
    settings = _child_settings(sweep, ray.get_runtime_context().gcs_address, parent, 1, tokenizer_from=None)
    with tempfile.TemporaryDirectory(prefix="flam-tokenizer-") as folder:
        spec = Path(folder, "spec.json")
        spec.write_text(Spec(config, settings).to_json())
        command = [sys.executable, "-m", "services.sweep.process", "--spec", str(spec), "--parent", str(os.getpid())]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        try:
            while process.poll() is None:
                lease.renew_if_due()
                time.sleep(_LOOK_SECONDS)
        except KeyboardInterrupt:
            process.terminate()  # it commits
            process.wait()
            raise
        if Path(folder, RUN).exists() and Path(folder, RUN).read_text() != sweep.tokenizer_runs[levels]:
            raise DataError("the data set has changed while the sweep began", fix="Run the same command again.")
    if code := process.returncode:
        kinds = {2: SettingsError, 3: EnvironmentFault, 4: DataError, 75: Stopped}
        raise kinds.get(code, TrainingFailed)(
            f"tokenizer {'x'.join(map(str, levels))} was not trained (exit {code})", fix="The lines above say why."
        )


def _room(sweep: Sweep) -> TrainSettings:
    """For a local Ray: with logical CPUs for all trials that run at a time."""
    at_a_time = sweep.settings.at_a_time or local_room(sweep)
    return replace(sweep.training, workers=str(at_a_time * (parse_workers(sweep.training.workers).most + 1)))


def local_room(sweep: Sweep) -> int:
    """How many trials this machine has cores and memory for; at least one."""
    workers = parse_workers(sweep.training.workers).most
    by_memory = psutil.virtual_memory().available // (_PROCESS_BYTES + workers * _WORKER_BYTES)
    return max(1, min((os.cpu_count() or 1) // workers, by_memory))


def _worker_cpus(sweep: Sweep) -> float:
    return parse_workers(sweep.training.workers).most * sweep.training.worker_cpus


def _at_a_time(sweep: Sweep) -> int:
    """How many trials the cluster has room for, at most as many as asked for. Raises EnvironmentFault if for none."""
    found = ray.cluster_resources()
    each = _worker_cpus(sweep) + FEED_CPUS + _PROCESS_CPUS
    fits = int(found.get("CPU", 0) / each)
    if sweep.training.gpu:
        fits = min(fits, int(found.get("GPU", 0)) // parse_workers(sweep.training.workers).most)
    if fits < 1:
        gpus = f" and {found.get('GPU', 0):g} GPUs" if sweep.training.gpu else ""
        raise EnvironmentFault(
            f"a trial needs {each:g} CPUs with --workers {sweep.training.workers}, the cluster has "
            f"{found.get('CPU', 0):g}{gpus}: trials would wait for ever",
            fix="Lower --workers or --worker_cpus (they are logical: 0.5 is fine), or add nodes.",
        )
    asked = sweep.settings.at_a_time
    if asked > fits:
        print(f"{asked} trials at a time were asked for, there is room for {fits}", flush=True)
    return min(asked or fits, fits, sweep.total)


def _open_parent(sweep: Sweep, tracking_uri: str) -> RunInfo:
    choices = {name: [str(v) for v in values] for name, values in sweep.space.choices(sweep.base).items()}
    return open_run(
        tracking_uri,
        sweep.training.experiment,
        sweep.name,
        params={f"space.{name}": ", ".join(values) or "follows" for name, values in choices.items()}
        | {"seeds": str(sweep.settings.seeds), "search": sweep.settings.search},
        tags={
            "kind": "sweep",
            "recipe": sweep.base.recipe,
            "dataset": sweep.data_name,
            "git_commit": git_commit(),
            "run_folder": sweep.folder.uri,
            "space": "; ".join(f"{name} {', '.join(values)}" for name, values in choices.items() if values),
            "objectives": ", ".join(f"{goal.direction} {goal.metric}" for goal in sweep.goals),
        },
    )


def _quiet_tune() -> None:
    """Tune is told to write and say little: results, progress and MLflow are the sweep's own."""
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "600",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what trials end with is in their records


@contextmanager
def _heeding_sigterm() -> Iterator[list[str]]:
    """SIGTERM does what Ctrl-C does: Tune has its trials stop, each of which commits. Names of the signals heard."""
    heard: list[str] = []

    def on_signal(number: int, _frame: object) -> None:
        heard.append(signal.Signals(number).name)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGTERM, before)

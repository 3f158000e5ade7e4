"""The driver of a run: identity, cluster, Ray Train, evaluation, registry."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
import ray.train
from ray.data import ExecutionOptions, ExecutionResources
from ray.exceptions import GetTimeoutError, RayError
from ray.train.torch import TorchTrainer

from flam_core.config_json import to_dict
from flam_core.errors import EnvironmentFault, FlamError, Stopped, TrainingFailed, unpack
from services.console import live_line
from services.feed import CacheSettings, flam_cause
from services.storage import Location, exists, read_bytes, write_bytes
from services.tracking.journal import Journal
from services.tracking.run import TrackedRun, open_run
from services.tracking.server import PARENT, RunInfo, check_server, default_tracking_uri
from services.training import checkpoints
from services.training.broken import merge_broken
from services.training.cluster import FEED_CPUS, check_resources, connect
from services.training.data import data_sha256
from services.training.elastic import ElasticData, nothing, parse_workers
from services.training.failures import Failures
from services.training.job import FEED_TOTALS, STARTS, TOKENIZER, Finished, WorkerJob
from services.training.lineage import git_commit
from services.training.prepare import Prepared, as_given, home
from services.training.stopping import Stopping
from services.training.worker import train_worker
from services.watch import Goodput, Lease, Watch, merged, start_control

_TASK_CPUS = 0.5
_ANSWER_SECONDS = 10.0
_DRAIN_SECONDS = 300.0
"""For which MLflow is waited for at the end."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run left."""

    run_id: str
    run: Location
    outputs: Path
    metrics: dict[str, float]
    model_address: str | None
    """`models:/flam-<dataset>/<version>`, or None without registering."""
    feed: dict[str, float]
    """What the feed did in the last attempt that trained (`TrainLog.totals`)."""
    goodput: dict[str, float]
    """Seconds of the run's wall time in each bucket (`services.watch.BUCKETS`)."""


def train(prepared: Prepared) -> RunResult:
    """Run both stages, evaluate, register. Running it again resumes, or finishes what is left to do.

    Raises TrainingFailed if the workers failed, EnvironmentFault for anything outside that is missing or if the run is
    running already, Stopped if the run was told to stop (SIGTERM, SIGINT): what was trained is committed then.
    """
    config, settings = prepared.config, prepared.settings
    tracking_uri = settings.tracking or default_tracking_uri(home())
    with Stopping() as stopping:
        check_server(tracking_uri)
        started = connect(settings)
        stopping.listen()
        goodput = None
        try:
            check_resources(settings)
            lease = Lease(prepared.run)
            lease.take(prepared.run_id)
            # From here on things are written: all that can be found missing beforehand has been.
            try:
                checkpoints.claim(prepared.run, config, data_sha256(prepared.sources))
                if prepared.tokenizer is not None:
                    write_bytes(prepared.run / TOKENIZER, prepared.tokenizer)
                goodput = Goodput(prepared.run, started=psutil.Process().create_time())
                tracking = _open_run(prepared, tracking_uri)
                try:
                    result = _train_and_finish(prepared, tracking, lease, goodput, stopping)
                except BaseException as error:
                    _mark(tracking, "KILLED" if isinstance(error, KeyboardInterrupt | Stopped) else "FAILED")
                    raise
                TrackedRun(tracking).finish("FINISHED")
            finally:
                lease.release()
        finally:
            if started:
                ray.shutdown()
            if goodput is not None:
                goodput.end()
                with suppress(EnvironmentFault):  # what went wrong before is the error to show
                    goodput.save()
    return result


def _train_and_finish(
    prepared: Prepared, tracking: RunInfo, lease: Lease, goodput: Goodput, stopping: Stopping
) -> RunResult:
    _fit(prepared, tracking, lease, goodput, stopping)
    goodput.training_ended()
    _send_journal(prepared, tracking)
    feed = json.loads(read_bytes(prepared.run / FEED_TOTALS))
    TrackedRun(tracking).summary({f"feed/total/{key}": value for key, value in feed.items()})
    done = _finish(prepared, tracking)
    goodput.end()
    trace = merged(prepared.run, goodput.spans)
    write_bytes(prepared.run / "trace.json", trace.encode())
    tracked = TrackedRun(tracking)
    tracked.text(trace, "report/trace.json")
    tracked.summary(goodput.metrics(), again=bool(goodput.now.workers))  # not if nothing was left to train
    return RunResult(
        prepared.run_id, prepared.run, done.outputs, done.metrics, done.model_address, feed, goodput.totals()
    )


def run_with(prepared: Prepared, function: Callable[[dict[str, Any]], None]) -> None:
    """Run a train function other than training's on what a run has, for benchmarks: nothing is evaluated or registered.

    Raises TrainingFailed if it fails, EnvironmentFault for anything outside that is missing.
    """
    started = connect(prepared.settings)
    try:
        check_resources(prepared.settings)
        checkpoints.claim(prepared.run, prepared.config, data_sha256(prepared.sources))
        tracking = _open_run(prepared, prepared.settings.tracking or default_tracking_uri(home()))
        control = start_control(prepared.run_id)
        try:
            _trainer(prepared, tracking, control, function).fit()
        except Exception as error:
            failure = _failure(control)
            raise (unpack(failure) if failure else _failed(error)) from error
    finally:
        if started:
            ray.shutdown()


def _open_run(prepared: Prepared, tracking_uri: str) -> RunInfo:
    config = prepared.config
    return open_run(
        tracking_uri,
        prepared.settings.experiment,
        prepared.run_id,
        params=_flat(to_dict(config)),
        tags={
            "recipe": config.recipe,
            "variant": config.variant,
            "dataset": prepared.data_name,
            "data": ",".join(as_given(source, alone=len(prepared.sources) == 1) for source in prepared.sources),
            "manifest_sha256": ", ".join(source.manifest.sha256 for source in prepared.sources),
            "config_sha256": config.sha256(),
            "git_commit": git_commit(),
            "run_folder": prepared.run.uri,
            **({PARENT: prepared.settings.parent} if prepared.settings.parent else {}),
        },
    )


def _fit(prepared: Prepared, tracking: RunInfo, lease: Lease, goodput: Goodput, stopping: Stopping) -> None:
    """Train until the last step is committed. Raises Stopped if the run was told to stop before that."""
    settings, plan = prepared.settings, prepared.plan
    if checkpoints.newest_step(prepared.run) >= plan.total_steps:
        print(f"run {prepared.run_id} is trained already: step {plan.total_steps}", flush=True)
        return
    control = start_control(prepared.run_id, furthest=goodput.furthest, step_seconds=goodput.step_seconds)
    watch = Watch(control, prepared.run, goodput, lease, stall_seconds=settings.stall_seconds, show=live_line())
    if exists(prepared.run / STARTS):  # whoever runs the command again wants another try
        prepared.run.fs.delete_file((prepared.run / STARTS).path)
    try:
        stopping.run(_trainer(prepared, tracking, control).fit, watch, lambda: _mark(tracking, "KILLED"))
        failure = _failure(control)
    except FlamError:
        raise
    except Exception as error:
        # Whatever Ray wraps it in, the cause is what people need.
        failure = _failure(control)
        raise (unpack(failure) if failure else _failed(error)) from error
    finally:
        watch.close()
        ray.kill(control)
        if broken := merge_broken(prepared.run, parse_workers(settings.workers).most):
            print(f"{broken} broken clips were left out: {prepared.run / 'quarantine.json'}", flush=True)
    if failure:
        raise unpack(failure)
    done = checkpoints.newest_step(prepared.run)
    if done < plan.total_steps or watch.why:  # who stops a run does not wait for its evaluation either
        raise Stopped(
            f"run {prepared.run_id} was stopped ({watch.why or 'the workers ended'}): step {done} of "
            f"{plan.total_steps} is committed",
            fix="The same command goes on from there.",
        )


def _trainer(
    prepared: Prepared, tracking: RunInfo, control: Any, function: Callable[[dict[str, Any]], None] = train_worker
) -> TorchTrainer:
    settings, plan, workers = prepared.settings, prepared.plan, parse_workers(prepared.settings.workers)
    left = ray.cluster_resources().get("CPU", 0) - workers.most * settings.worker_cpus
    job = WorkerJob(
        prepared.config,
        plan,
        prepared.run,
        tracking,
        control,
        settings.threads,
        settings.max_bad_share,
        settings.parallel,
        settings.keep,
        settings.clips_at_a_time,
        settings.compiled,
        settings.recomputed,
        settings.max_restarts,
        tuple(filter(None, settings.chaos.split(","))),
    )
    data = ElasticData(
        plan,
        prepared.run,
        task_cpus=_TASK_CPUS,
        cache=CacheSettings(settings.cache, int(settings.cache_gb * 1e9)) if settings.cache else None,
        options=ExecutionOptions(
            preserve_order=True,
            resource_limits=ExecutionResources(cpu=max(FEED_CPUS, settings.feed_cpus or left)),
        ),
    )
    return TorchTrainer(
        function,
        train_loop_config={"job": job},
        datasets={"train": nothing},
        dataset_config=data,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.for_ray(),
            use_gpu=settings.gpu,
            resources_per_worker={"CPU": settings.worker_cpus, **({"GPU": 1} if settings.gpu else {})},
        ),
        # Ray Train keeps nothing here that a resume needs, but asks for a place that all nodes see.
        run_config=ray.train.RunConfig(
            name=f"attempt-{int(time.time())}",
            storage_filesystem=prepared.run.fs,
            storage_path=(prepared.run / "ray").path,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            # The workers themselves give up when they get nowhere (worker._count_start); a benchmark fails at once.
            failure_config=ray.train.FailureConfig(max_failures=-1 if function is train_worker else 0),
            callbacks=[Failures(prepared.run)],
        ),
    )


def _mark(tracking: RunInfo, status: Literal["FAILED", "KILLED"]) -> None:
    """Say in MLflow how the run ended. MLflow may be what failed: the first error is the one to show."""
    try:
        TrackedRun(tracking).finish(status)
    except FlamError as unreachable:
        print(f"the run could not be marked {status}: {unreachable}", flush=True)


def _failure(control: Any) -> str:
    """What a worker reported before the run ended; empty if none did."""
    try:
        return str(ray.get(control.failure.remote(), timeout=_ANSWER_SECONDS))
    except (RayError, GetTimeoutError):
        return ""


def _send_journal(prepared: Prepared, tracking: RunInfo) -> None:
    """Until MLflow has all that the workers logged. Raises EnvironmentFault if it does not take it."""
    journal = Journal(tracking, prepared.run)
    try:
        journal.drain(_DRAIN_SECONDS)
    finally:
        journal.close()


def _failed(error: BaseException) -> TrainingFailed:
    """What Ray Train says, cut down to the last line of the first failed worker's traceback."""
    failures = list(getattr(error, "worker_failures", {}).values())
    lines = str(failures[0] if failures else error).strip().splitlines() or [type(error).__name__]
    return TrainingFailed(
        f"training failed: {lines[-1].strip()}",
        fix="--debug shows where. Committed steps are kept: the same command resumes.",
    )


def _finish(prepared: Prepared, tracking: RunInfo) -> Finished:
    """Evaluation and registration, where the accelerator is: as a Ray task."""
    task = ray.remote(num_cpus=1, num_gpus=1 if prepared.settings.gpu else 0, max_retries=0)(_finish_here)
    try:
        return ray.get(task.remote(prepared, tracking, home() / "outputs" / prepared.run_id))
    except RayError as error:
        raise flam_cause(error) or _failed(error) from error


def _finish_here(prepared: Prepared, tracking: RunInfo, outputs: Path) -> Finished:
    from services.training.finish import finish  # seconds of imports, which the driver need not wait for

    return finish(prepared, tracking, outputs)


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat

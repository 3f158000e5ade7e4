"""The driver of a run: identity, cluster, Ray Train, evaluation, registry."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
from ray.data import ExecutionOptions, ExecutionResources
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer

from flam_core.config import Config
from flam_core.config_json import canonical_json, differing_fields, to_dict
from flam_core.data.manifest import Manifest
from flam_core.errors import EnvironmentFault, FlamError, SettingsError, TrainingFailed
from flam_core.evaluation.perceptual import check_weights
from flam_core.recipes import get_recipe
from services.feed import CacheSettings, FeedPlan, FeedSource, flam_cause, make_dataset
from services.storage import Location, read_bytes, resolve, write_bytes
from services.tracking import Journal, RunInfo, TrackedRun, check_server, default_tracking_uri, open_run
from services.training import checkpoints
from services.training.broken import merge_broken
from services.training.data import check_frame_size, data_sha256, open_sources, parse_data, stage_plans, verify_sources
from services.training.finish import Finished, finish
from services.training.settings import TrainSettings, settle
from services.training.worker import FEED_TOTALS, TOKENIZER, WorkerJob, train_worker

_TASK_CPUS = 0.5
_FEED_CPUS = 0.6
"""One read task and what tells it which: the least that Ray Data needs beside the workers."""
_OBJECT_STORE_BYTES = 1 << 30
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
    """What the feed did in the last attempt that trained (`worker._Log.totals`)."""


@dataclass(frozen=True)
class Prepared:
    """A run that can be started: settings and data fit, nothing is running yet."""

    config: Config
    settings: TrainSettings
    sources: tuple[FeedSource, ...]
    run: Location
    run_id: str
    plan: FeedPlan
    tokenizer: bytes | None
    """Weights of a tokenizer that was given."""

    @property
    def manifest(self) -> Manifest:
        """Of the data set that the model is evaluated on: the first."""
        return self.sources[0].manifest

    @property
    def data(self) -> Location:
        """Where that data set lies."""
        return self.sources[0].data

    @property
    def data_name(self) -> str:
        """Name of the data, and so of the model: flam-NAME."""
        return "-".join(source.manifest.name for source in self.sources)


def home() -> Path:
    """The folder that relative default places are in: FLAM_HOME, else the current one."""
    return Path(os.environ.get("FLAM_HOME", ".")).absolute()


def prepare(config: Config, settings: TrainSettings) -> Prepared:
    """Check settings against data and storage. Raises FlamError with the reason if they do not fit."""
    storage = resolve(_at_home(settings.storage))
    places = [(_at_home(place), weight) for place, weight in parse_data(settings.data)]
    sources = open_sources(places, max_bad_share=settings.max_bad_share)
    config, tokenizer = settle(config, settings, sources)
    if settings.resume:
        config = _resumed_config(config, checkpoints.stored_config(storage / settings.resume), settings.resume)
    check_frame_size(sources, config)
    stages = stage_plans(config)
    plan = FeedPlan(
        sources, stages, config.seed, settings.workers, settings.decode, truth=config.model.latent == "true"
    )
    plan.mixtures()
    check_weights(config.evaluation)
    if settings.verify:
        verify_sources(sources)
    run_id = settings.resume or _run_id(config, data_sha256(sources), settings.fresh)
    return Prepared(config, settings, sources, storage / run_id, run_id, plan, tokenizer)


def train(prepared: Prepared) -> RunResult:
    """Run both stages, evaluate, register. Running it again resumes, or finishes what is left to do.

    Raises TrainingFailed if the workers failed, EnvironmentFault for anything outside that is missing.
    """
    config, settings = prepared.config, prepared.settings
    tracking_uri = settings.tracking or default_tracking_uri(home())
    check_server(tracking_uri)
    started = _connect(settings)
    try:
        _check_resources(settings)
        # From here on things are written: all that can be found missing beforehand has been.
        checkpoints.claim(prepared.run, config, data_sha256(prepared.sources))
        if prepared.tokenizer is not None:
            write_bytes(prepared.run / TOKENIZER, prepared.tokenizer)
        tracking = _open_run(prepared, tracking_uri)
        try:
            _fit(prepared, tracking)
            _send_journal(prepared, tracking)
            feed = json.loads(read_bytes(prepared.run / FEED_TOTALS))
            TrackedRun(tracking).summary({f"feed/total/{key}": value for key, value in feed.items()})
            done = _finish(prepared, tracking)
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            try:
                TrackedRun(tracking).finish(status)
            except FlamError as unreachable:  # MLflow may be what failed; the first error is the one to show
                print(f"the run could not be marked {status}: {unreachable}", flush=True)
            raise
        TrackedRun(tracking).finish("FINISHED")
    finally:
        if started:
            ray.shutdown()
    return RunResult(prepared.run_id, prepared.run, done.outputs, done.metrics, done.model_address, feed)


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
            "data": ",".join(_as_given(source, alone=len(prepared.sources) == 1) for source in prepared.sources),
            "manifest_sha256": ", ".join(source.manifest.sha256 for source in prepared.sources),
            "config_sha256": config.sha256(),
            "git_commit": git_commit(),
            "run_folder": prepared.run.uri,
        },
    )


def _fit(prepared: Prepared, tracking: RunInfo) -> None:
    settings, plan = prepared.settings, prepared.plan
    if checkpoints.newest_step(prepared.run) >= plan.total_steps:
        print(f"run {prepared.run_id} is trained already: step {plan.total_steps}", flush=True)
        return
    cpus = ray.cluster_resources().get("CPU", 0)
    job = WorkerJob(
        prepared.config,
        plan,
        prepared.run,
        tracking,
        settings.threads,
        settings.max_bad_share,
        settings.keep,
        settings.clips_at_a_time,
        settings.compiled,
        settings.recomputed,
    )
    cache = CacheSettings(settings.cache, int(settings.cache_gb * 1e9)) if settings.cache else None
    options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources(cpu=max(_FEED_CPUS, cpus - settings.workers * settings.worker_cpus)),
    )

    def dataset() -> ray.data.Dataset:
        # Train calls this whenever it starts a group of workers, so a restarted group begins at the newest commit.
        return make_dataset(plan, checkpoints.newest_step(prepared.run), task_cpus=_TASK_CPUS, cache=cache)

    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        datasets={"train": dataset},
        dataset_config=ray.train.DataConfig(execution_options=options),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpu,
            resources_per_worker={"CPU": settings.worker_cpus, **({"GPU": 1} if settings.gpu else {})},
        ),
        # Ray Train keeps nothing here that a resume needs, but asks for a place that all nodes see.
        run_config=ray.train.RunConfig(
            name=f"attempt-{int(time.time())}",
            storage_filesystem=prepared.run.fs,
            storage_path=(prepared.run / "ray").path,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    )
    checkpoints.clear_failure(prepared.run)
    try:
        trainer.fit()
    except Exception as error:
        # Whatever Ray wraps it in, the cause is what people need.
        raise checkpoints.failure(prepared.run) or _failed(error) from error
    finally:
        if broken := merge_broken(prepared.run, settings.workers):
            print(f"{broken} broken clips were left out: {prepared.run / 'quarantine.json'}", flush=True)
    if left := checkpoints.failure(prepared.run):
        raise left


def _send_journal(prepared: Prepared, tracking: RunInfo) -> None:
    """Until MLflow has all that the workers logged. Raises EnvironmentFault if it does not take it."""
    journal = Journal(tracking, prepared.run)
    try:
        journal.drain(_DRAIN_SECONDS)
    finally:
        journal.close()


def _check_resources(settings: TrainSettings) -> None:
    """Raises EnvironmentFault if the cluster can never run this: Ray itself would wait for ever, with a warning."""
    cpus = ray.cluster_resources().get("CPU", 0)
    if settings.workers * settings.worker_cpus + _FEED_CPUS > cpus:
        raise EnvironmentFault(
            f"{settings.workers} workers of {settings.worker_cpus:g} CPUs leave Ray Data less than {_FEED_CPUS} of the "
            f"cluster's {cpus:g} CPUs: the run would wait for ever",
            fix="Lower --workers or --worker_cpus (they are logical: 0.5 is fine), or add CPUs.",
        )
    if settings.gpu and ray.cluster_resources().get("GPU", 0) < settings.workers:
        raise EnvironmentFault(
            f"{settings.workers} GPUs asked for, the cluster has {ray.cluster_resources().get('GPU', 0):g}",
            fix="Lower --workers, leave out --gpu, or add GPUs.",
        )


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
    task = ray.remote(num_cpus=1, num_gpus=1 if prepared.settings.gpu else 0, max_retries=0)(finish)
    try:
        return ray.get(task.remote(prepared, tracking, home() / "outputs" / prepared.run_id))
    except RayError as error:
        raise flam_cause(error) or _failed(error) from error


def _connect(settings: TrainSettings) -> bool:
    """Join the cluster, or start a local Ray; whether this process started it."""
    if ray.is_initialized():
        return False
    address = settings.address or os.environ.get("RAY_ADDRESS")
    common = {"logging_level": "WARNING", "log_to_driver": True}
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else every line of a worker appears twice
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    try:
        if address:
            _check_head(address)
            ray.init(address=address, **common)
        else:
            cpus = max(os.cpu_count() or 1, int(settings.workers * settings.worker_cpus) + 2)
            ray.init(num_cpus=cpus, object_store_memory=_OBJECT_STORE_BYTES, **common)  # logical CPUs
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EnvironmentFault(
            f"no Ray cluster at {address}: {str(error).splitlines()[0]}", fix="Check --address or RAY_ADDRESS."
        ) from error
    return True


def _check_head(address: str) -> None:
    """Raises EnvironmentFault if nothing listens at host:port, where Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise EnvironmentFault(
            f"no Ray cluster at {address}: {error.strerror or error}", fix="Check --address or RAY_ADDRESS."
        ) from error


def _resumed_config(asked: Config, stored: Config, run_id: str) -> Config:
    """The config of the run to resume. Raises SettingsError if a setting that was given differs from it."""
    given = {field.split(" ")[0] for field in differing_fields(get_recipe(asked.recipe), asked)}
    differing = [field for field in differing_fields(stored, asked) if field.split(" ")[0] in {*given, "recipe"}]
    if differing:
        raise SettingsError(
            f"run {run_id} was started with other settings: {', '.join(differing)}",
            fix="Leave them out to resume it as it is, or leave out --resume for a run of its own.",
        )
    return stored


def _run_id(config: Config, data: str, fresh: bool) -> str:
    content = canonical_json([to_dict(config), data, config.seed])
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    run_id = f"{config.recipe}-{digest}"
    if not fresh:
        return run_id
    return f"{run_id}-{time.strftime('%Y%m%d-%H%M%S')}"


def _at_home(address: str) -> str:
    return address if "://" in address else str(home() / Path(address).expanduser())


def _as_given(source: FeedSource, *, alone: bool) -> str:
    """A data set as `--data` names it."""
    return source.data.uri if alone else f"{source.data.uri}@{source.weight:g}"


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def git_commit() -> str:
    """The commit of the code, or "unknown" outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"

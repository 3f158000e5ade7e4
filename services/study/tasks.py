"""What studies share: Ray, results that are kept, and training in one process."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from flam_core.config import Config
from flam_core.data.manifest import read_manifest
from flam_core.errors import EnvironmentFault
from flam_core.learning.collapse import LOG_EVERY, CollapseWatch
from flam_core.learning.trainer import Trainer
from services.feed import Assembler, FeedPlan, FeedSource, flam_cause, local_steps
from services.feed.prefetch import memory_for
from services.storage import resolve
from services.training.cluster import join_or_start
from services.training.data import stage_plans

CellT = TypeVar("CellT")
RETRIES = 2
"""How often a task is begun anew whose process or node is lost. What a task itself raises is final."""
_SAY_EVERY = 200


@contextmanager
def ray_for(
    address: str | None, tasks: int, object_store: int = 128 << 20, *, cpus: float = 1, gpus: float = 0
) -> Iterator[None]:
    """A cluster that is joined (`address`, else RAY_ADDRESS), or a local Ray for so many tasks at a time with so many
    bytes for what they hand on, which ends afterwards. cpus, gpus: what one task takes.

    Raises EnvironmentFault if there is none, or none of its nodes can ever run a task.
    """
    if ray.is_initialized():
        check_task(cpus, gpus)
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    join_or_start(address, {"num_cpus": tasks, "object_store_memory": object_store}, logging_level=logging.WARNING)
    try:
        check_task(cpus, gpus)
        yield
    finally:
        ray.shutdown()


def check_task(cpus: float, gpus: float) -> None:
    """Raises EnvironmentFault if no node has the CPUs and GPUs of one task: Ray would let it wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus for has in nodes):
        return
    whole = ray.cluster_resources()
    raise EnvironmentFault(
        f"a task needs {cpus:g} CPUs and {gpus:g} GPUs of one node, and none has them: the cluster has "
        f"{whole.get('CPU', 0):g} CPUs and {whole.get('GPU', 0):g} GPUs in all, on {len(nodes)} nodes",
        fix="Lower --threads or --gpus, or add such a node.",
    )


def result_of(reference: Any) -> Any:
    """What a task gave. Raises a FlamError that it ended with as it was, without Ray's traceback in its message;
    EnvironmentFault if its process was lost, and was so each time it was begun anew."""
    try:
        return ray.get(reference)
    except RayError as error:
        cause = flam_cause(error)
        if cause is None and isinstance(error, RayTaskError):  # a mistake in what it runs: its traceback says where
            raise
        raise cause or _lost(error) from error


def _lost(error: RayError) -> EnvironmentFault:
    why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return EnvironmentFault(
        f"the process of a task was lost {1 + RETRIES} times: {why}",
        fix="Was it killed, or the memory too small (fewer --tasks)? The same command goes on with what is not done.",
    )


def as_they_finish(running: Mapping[Any, CellT]) -> Iterator[tuple[CellT, Any, str]]:
    """Each cell whose task has ended, with what it gave and, in words, how many are to go and for how long. `running`
    has the cells by their tasks. Raises as `result_of`."""
    left, begun = dict(running), time.monotonic()
    while left:
        (first,), _ = ray.wait(list(left), num_returns=1)
        cell = left.pop(first)
        result = result_of(first)
        minutes = (time.monotonic() - begun) / (len(running) - len(left)) * len(left) / 60
        yield cell, result, f"{len(left)} to go, about {minutes:.0f} min"


class Results:
    """Results of cells by their names: kept in `folder/cells`, and beside the tables in `out/cells`, from where they
    can be handed on. What is in either is not done again."""

    def __init__(self, folder: Path, out: Path) -> None:
        self._own, self._shown = folder / "cells", out / "cells"

    def find(self, name: str) -> dict[str, Any] | None:
        """A result that is there already, also beside the tables from now on."""
        place = next((place for place in self._places(name) if place.exists()), None)
        if place is None:
            return None
        result = json.loads(place.read_text())
        self.show(name, result)
        return result

    def has(self, name: str) -> bool:
        """Whether it is there."""
        return any(place.exists() for place in self._places(name))

    def _places(self, name: str) -> tuple[Path, Path]:
        return self._own / f"{name}.json", self._shown / f"{name}.json"

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Where a task does it: in the folder."""
        write_whole(self._own / f"{name}.json", _json(result))

    def show(self, name: str, result: dict[str, Any]) -> None:
        """Beside the tables, unless it is there."""
        place = self._shown / f"{name}.json"
        if not place.exists():
            write_whole(place, _json(result))


def _json(result: dict[str, Any]) -> bytes:
    return json.dumps(result, indent=1, sort_keys=True).encode()


def write_whole(place: Path, content: bytes) -> None:
    """Whole or not at all: what exists is taken for done."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{place.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(place)


def train_here(
    config: Config,
    data: str,
    *,
    until: int,
    name: str,
    threads: int,
    gpus: float,
    tokenizer: bytes | None = None,
    watch: CollapseWatch | None = None,
) -> Trainer:
    """A trainer after `until` steps: the same program, sample order and noise as a Ray Train run with one worker.

    watch: what sees the log lines, for who wants to know what holds at the end. What begins to go wrong is printed.
    """
    watch = watch or CollapseWatch(config)
    torch.set_num_threads(threads)
    device = torch.device("cuda" if gpus else "cpu")
    stages = stage_plans(config)
    plan = FeedPlan((source_of(data),), stages, config.seed, world=1, truth=config.model.latent == "true")
    trainer = Trainer(config, device, tokenizer=tokenizer)
    assembler = Assembler(plan, 0, memory=memory_for(device))
    try:
        for batch in local_steps(plan, 0, assembler):
            if trainer.step == until:
                break
            actions = None if batch.actions is None else torch.from_numpy(batch.actions).to(device)
            meters = trainer.train_step(torch.from_numpy(batch.frames).to(device), batch.ids, actions, batch.places)
            if trainer.step % LOG_EVERY == 0 or trainer.step == until:
                values = {key: float(value) for key, value in meters.items()}
                first = 0 if "tokenizer/loss" in values else config.tokenizer_stage.steps
                for finding in watch.observe(trainer.step - first, values):
                    print(f"{name}: warning: {finding}", flush=True)
            if trainer.step % _SAY_EVERY == 0:
                said = ("tokenizer/psnr", "flam/explained", "flam/kl")
                values = "  ".join(f"{key.split('/')[1]} {float(meters[key]):.3g}" for key in said if key in meters)
                print(f"{name}: step {trainer.step} of {until}  {values}", flush=True)
    finally:
        assembler.close()
    return trainer


def source_of(data: str) -> FeedSource:
    """A data set that the study made."""
    location = resolve(data)
    return FeedSource(location, read_manifest(location.fs, location.path))


def refuse_broken(clip: object) -> None:
    """For what reads such a data set."""
    raise AssertionError(f"data that the study made itself are broken: {clip}")

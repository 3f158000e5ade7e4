"""What a run is told beside its config, and the config that comes of both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

from flam_core.config import Config
from flam_core.errors import SettingsError
from flam_core.saved_model import load_tokenizer, weights_to_bytes
from flam_core.variants import TRUE_ACTIONS, apply_variant
from services.feed import Decode, FeedSource
from services.training.chaos import parse_chaos
from services.training.data import describe_actions
from services.training.elastic import parse_workers


@dataclass(frozen=True)
class TrainSettings:
    """Where and on what a run runs; nothing here changes what is learnt but data and tokenizer."""

    data: str = "data/grid"
    """The data set: a folder or s3://bucket/prefix. Several with their shares of each batch: data/a@2,data/b@1; the
    first is the one that the model is evaluated on."""
    tokenizer_from: str | None = None
    """Take this tokenizer, or that of this model (a folder, a run, models:/NAME/VERSION), instead of training one."""
    storage: str = "outputs"
    """Where the run keeps config and checkpoints: a folder or s3://bucket/prefix."""
    tracking: str | None = None
    """MLflow's address; default MLFLOW_TRACKING_URI, else an SQLite file beside the outputs."""
    experiment: str = "flam"
    """MLflow experiment."""
    workers: str = "1"
    """Ray Train workers (data-parallel ranks): a number, or a range such as 2:8 for as many as there is room for."""
    worker_cpus: float = 1.0
    """Logical CPUs of each worker. Ray Data needs some beside them."""
    feed_cpus: float = 0.0
    """Logical CPUs that Ray Data may take; 0: all that the workers leave."""
    parent: str | None = None
    """MLflow's id of the run that this one is shown below."""
    threads: int = 0
    """PyTorch threads of each worker; 0: the cores of this machine but one, shared out among the
    workers."""
    gpu: bool = False
    """One GPU for each worker."""
    address: str | None = None
    """Ray cluster; default RAY_ADDRESS, else a local Ray is started and stopped."""
    fresh: bool = False
    """Start another run even if one with the same inputs exists."""
    resume: str | None = None
    """Go on with the run of this id, with its own settings. A setting given beside it must be the run's."""
    verify: bool = True
    """Check every shard's sha256 before training."""
    max_bad_share: float = 0.01
    """Share of clips that may be broken or quarantined; beyond it the run stops with the list."""
    decode: Decode = "auto"
    """Where clips are decoded: beside the trainer (worker), in Ray Data tasks (task), or as suits the codec."""
    cache: str | None = None
    """A folder on each node in which row groups read from a bucket are kept; default: none."""
    cache_gb: float = 20.0
    """What the cache may hold."""
    keep: int = 2
    """Newest checkpoints that are kept, beside the one that scored best on held-out clips (evaluation.during)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Whether each worker keeps all weights (ddp), or they share out the blocks' weights, gradients and optimiser state
    (fsdp): less memory for models that need it, more to send."""
    clips_at_a_time: int = 0
    """Clips that go through the model together on one worker, whose gradients add up to those of the batch; 0: all of
    its part. Fewer take less memory."""
    compiled: bool = False
    """Train with torch.compile: faster on a GPU, after minutes of compiling."""
    recomputed: bool = False
    """Compute activations again for the backward pass instead of keeping them: less memory, a third more time."""
    register: bool = True
    """Register the model in MLflow."""
    stall_seconds: float = 60.0
    """A worker that does not go on for so long, or for 20 steps if that is longer, is ended and started anew."""
    max_restarts: int = 5
    """How often in a row workers may end without a new checkpoint before the run gives up."""
    chaos: str = ""
    """Faults to bring about, such as kill:0@40,mlflow-down@100 (docs/reliability.md)."""

    def __post_init__(self) -> None:
        parse_workers(self.workers)
        parse_chaos(self.chaos)
        if self.stall_seconds <= 0:
            raise SettingsError(f"stall_seconds = {self.stall_seconds}", fix="Use a number above 0.")
        if self.max_restarts < 0:
            raise SettingsError(f"max_restarts = {self.max_restarts}", fix="Use 0 or more.")
        if self.keep < 1:
            raise SettingsError(f"keep = {self.keep}", fix="Use 1 or more.")
        if self.clips_at_a_time < 0:
            raise SettingsError(f"clips_at_a_time = {self.clips_at_a_time}", fix="Use 1 or more, or 0 for all.")
        if not 0 <= self.max_bad_share <= 1:
            raise SettingsError(f"max_bad_share = {self.max_bad_share}", fix="It is a share: 0 to 1.")
        if self.cache_gb <= 0:
            raise SettingsError(f"cache_gb = {self.cache_gb}", fix="Use a number above 0.")
        if self.worker_cpus <= 0:
            raise SettingsError(f"worker_cpus = {self.worker_cpus}", fix="Use a number above 0.")
        if self.feed_cpus < 0:
            raise SettingsError(f"feed_cpus = {self.feed_cpus}", fix="Use a number above 0, or 0 for all.")


def take_recipe(words: list[str], job: str) -> str:
    """Take the recipe's name off the front of a command line; without one it is `tiny`. Raises SettingsError where it
    is given as a flag, which would change its name and nothing else."""
    if any(word.partition("=")[0] == "--recipe" for word in words):
        raise SettingsError("--recipe is not a flag", fix=f"Give the recipe as the first word: {job} tiny ...")
    return words.pop(0) if words and not words[0].startswith("-") else "tiny"


def settle(config: Config, settings: TrainSettings, sources: tuple[FeedSource, ...]) -> tuple[Config, bytes | None]:
    """The config with its variant and its tokenizer worked in, and the weights of a tokenizer that is given.

    Raises SettingsError for an unknown variant, DataError if there is no such model.
    """
    weights = None
    if settings.tokenizer_from is not None:
        tokenizer = load_tokenizer(settings.tokenizer_from)
        weights = weights_to_bytes(tokenizer)
        config = replace(
            config,
            tokenizer=tokenizer.config,
            tokenizer_stage=replace(config.tokenizer_stage, steps=0),
            tokenizer_sha256=hashlib.sha256(weights).hexdigest(),
        )
    actions = describe_actions(sources) if config.variant == TRUE_ACTIONS else None
    return apply_variant(config, config.variant, actions), weights

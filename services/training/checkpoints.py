"""Committed checkpoints in a run's folder or bucket.

A checkpoint is a folder `checkpoints/step-<8 digits>/` with `model.safetensors`, `optimizer.pt`, `meta.json`, with a
running mean of the weights also `mean.safetensors`, and, written last, `COMMIT`, which holds the sha256 of each file.
Without a COMMIT that fits, a folder is no checkpoint. `checkpoints/index.json` names the committed ones and the best of
them, so that nothing has to list a bucket.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from flam_core.config import Config
from flam_core.config_json import canonical_json, differing_fields, from_dict, to_dict
from flam_core.errors import DataError, SettingsError
from flam_core.learning.state import TrainState
from services.storage import Location, exists, read_bytes, write_bytes

_MODEL, _OPTIMIZER, _MEAN, _META = "model.safetensors", "optimizer.pt", "mean.safetensors", "meta.json"


@dataclass(frozen=True)
class Best:
    """The committed checkpoint that scored highest on held-out clips."""

    step: int
    score: float


@dataclass(frozen=True)
class _Index:
    """Which checkpoints are committed."""

    steps: list[int] = field(default_factory=list)
    best: Best | None = None

    def kept(self, newest: int) -> list[int]:
        """The newest of them and the best."""
        return [step for step in self.steps if step in self.steps[-newest:] or (self.best and step == self.best.step)]


def save(run: Location, state: TrainState, *, keep: int = 2, score: float | None = None) -> None:
    """Write and commit a checkpoint, then forget all but the newest `keep` and the one with the best score.

    Raises EnvironmentFault if the storage does not take it; what was committed before is still there then.
    """
    step: int = state.meta["step"]
    folder = run / "checkpoints" / _name(step)
    contents = {_MODEL: state.model, _OPTIMIZER: state.optimizer, _META: canonical_json(state.meta).encode()}
    if state.mean is not None:
        contents[_MEAN] = state.mean
    for name, content in contents.items():
        write_bytes(folder / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    write_bytes(folder / "COMMIT", canonical_json(digests).encode())
    known = _read_index(run)
    best = known.best
    if score is not None and (best is None or score > best.score):
        best = Best(step, score)
    index = _Index(sorted({*known.steps, step}), best)
    _write_index(run, index)
    kept = index.kept(keep)
    if kept != index.steps:
        for old in sorted({*index.steps} - {*kept}):
            with suppress(FileNotFoundError):  # deleted by a save that was killed before it could say so
                run.fs.delete_dir((run / "checkpoints" / _name(old)).path)
        # Only now are they forgotten: a kill before this leaves them named, and the next save deletes them.
        _write_index(run, _Index(kept, best))


class Writer:
    """Saves checkpoints in a thread of its own, one at a time, so that training goes on meanwhile.

    What a save raises is raised by the next call.
    """

    def __init__(self, run: Location, keep: int) -> None:
        self._run, self._keep = run, keep
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.committed = 0
        """Step of the newest checkpoint that this writer committed; 0 before."""
        self.seconds = 0.0
        """That saving took, beside the training."""

    def save(
        self, state: TrainState, score: float | None = None, *, then: Callable[[int], None] = lambda _step: None
    ) -> None:
        """Begin to save, once the checkpoint before is committed. `then` is told the step once this one is."""
        self.wait()
        self._thread = threading.Thread(target=self._save, args=(state, score, then), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until all is committed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _save(self, state: TrainState, score: float | None, then: Callable[[int], None]) -> None:
        begun = time.perf_counter()
        try:
            save(self._run, state, keep=self._keep, score=score)
            self.committed = state.meta["step"]
            print(f"committed step {self.committed} ({time.perf_counter() - begun:.2f} s)", flush=True)
            then(self.committed)
        except BaseException as error:  # noqa: BLE001 - raised where the next checkpoint is saved
            self._failure = error
        self.seconds += time.perf_counter() - begun


def newest(run: Location) -> TrainState | None:
    """The newest committed checkpoint that is whole; None if there is none.

    A damaged one is passed over with a word on the console, since the one before it is still good.
    """
    for step in reversed(_read_index(run).steps):
        folder = run / "checkpoints" / _name(step)
        try:
            digests: dict[str, str] = json.loads(read_bytes(folder / "COMMIT"))
            contents = {name: read_bytes(folder / name) for name in {_MODEL, _OPTIMIZER, _META, *digests}}
        except (DataError, ValueError) as error:
            print(f"checkpoint {folder} is not whole and is passed over: {error}", flush=True)
            continue
        broken = [name for name in contents if hashlib.sha256(contents[name]).hexdigest() != digests.get(name)]
        if broken:
            print(f"checkpoint {folder} is damaged ({', '.join(sorted(broken))}) and is passed over", flush=True)
            continue
        return TrainState(contents[_MODEL], contents[_OPTIMIZER], contents.get(_MEAN), json.loads(contents[_META]))
    return None


def committed_step(run: Location) -> int:
    """The newest step that `index.json` names; 0 if it names none. Unlike `newest_step`, reads no weights."""
    return max(_read_index(run).steps, default=0)


def newest_step(run: Location) -> int:
    """The step that `newest` resumes from; 0 if there is none. The feed must start where the trainer does."""
    saved = newest(run)
    return saved.meta["step"] if saved else 0


def forget_after(run: Location, step: int) -> None:
    """Forget the checkpoints of more than `step` steps: what they hold is spoilt."""
    known = _read_index(run)
    best = known.best if known.best and known.best.step <= step else None
    _write_index(run, _Index([one for one in known.steps if one <= step], best))


def stored_config(run: Location) -> Config:
    """The config that a run was started with. Raises DataError if there is no such run."""
    place = run / "config.json"
    try:
        values = json.loads(read_bytes(place))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} is not a run's config", fix="Was it edited by hand?") from error
    return from_dict(Config, values, str(place))


def claim(run: Location, config: Config, manifest_sha256: str) -> None:
    """Write config and data set identity into the run's folder, or check that they are the ones there.

    Raises SettingsError, naming the fields, if the folder belongs to another config or data set.
    """
    place = run / "config.json"
    if not exists(place):
        content = {"config": to_dict(config), "manifest_sha256": manifest_sha256}
        write_bytes(place, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        return
    changed = differing_fields(stored_config(run), config)
    if json.loads(read_bytes(place))["manifest_sha256"] != manifest_sha256:
        changed.append("the data set (its manifest has another sha256)")
    if changed:
        raise SettingsError(
            f"run {run} was started with other settings: {', '.join(changed)}",
            fix="Use the settings it was started with, or leave out --resume for a run of its own.",
        )


def _read_index(run: Location) -> _Index:
    place = run / "checkpoints" / "index.json"
    if not exists(place):
        return _Index()
    try:
        found = json.loads(read_bytes(place))
        best = found["best"]
        return _Index(sorted(map(int, found["steps"])), None if best is None else Best(best["step"], best["score"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{place} does not name a run's checkpoints", fix="Was it edited by hand? Without it the run starts anew."
        ) from error


def _write_index(run: Location, index: _Index) -> None:
    best = None if index.best is None else {"step": index.best.step, "score": index.best.score}
    content = canonical_json({"steps": index.steps, "best": best})
    write_bytes(run / "checkpoints" / "index.json", content.encode())


def _name(step: int) -> str:
    return f"step-{step:08d}"

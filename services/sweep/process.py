"""A trial's own process: the training service as `jobs/train.py` runs it, told by a file what to train.

    python -m services.sweep.process SPEC.json

Its exit codes are those of docs/errors.md. It ends, after a commit, when the process that started it does.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flam_core.config import Config
from flam_core.config_json import from_dict, to_dict
from flam_core.saved_model import CARD, CONFIG, WEIGHTS
from services.console import run_program
from services.storage import read_bytes, resolve, write_bytes
from services.training.launch import train
from services.training.prepare import prepare
from services.training.settings import TrainSettings

RUN = "run"
"""Where, beside the spec, the process says which run it trains."""
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Spec:
    """What to train."""

    config: Config
    settings: TrainSettings
    """`tokenizer_from` may be the folder of a run in a bucket."""

    def to_json(self) -> str:
        """`from_json` reads it."""
        return json.dumps({"config": to_dict(self.config), "settings": asdict(self.settings)})

    @staticmethod
    def from_json(text: str) -> Spec:
        """Raises SettingsError if it is not what `to_json` gave."""
        values: dict[str, Any] = json.loads(text)
        return Spec(from_dict(Config, values["config"]), from_dict(TrainSettings, values["settings"], "settings"))


@dataclass(frozen=True)
class Arguments:
    """What the process is told."""

    spec: Path
    """A file that holds a `Spec`."""
    parent: int
    """Process id of who started it."""


def main(arguments: Arguments) -> None:
    """Say which run it is, and train it."""
    _end_with(arguments.parent)
    spec = Spec.from_json(arguments.spec.read_text())
    with tempfile.TemporaryDirectory(prefix="flam-tokenizer-") as folder:
        prepared = prepare(spec.config, _with_tokenizer_at_hand(spec.settings, Path(folder)))
    write_bytes(resolve(arguments.spec.parent) / RUN, prepared.run_id.encode())
    print(f"run {prepared.run_id}: {prepared.manifest.name}, {prepared.manifest.frames} frames", flush=True)
    train(prepared)


def _with_tokenizer_at_hand(settings: TrainSettings, folder: Path) -> TrainSettings:
    """A tokenizer that lies in a bucket, brought here."""
    if settings.tokenizer_from is None or "://" not in settings.tokenizer_from:
        return settings
    source = resolve(settings.tokenizer_from) / "model"
    for name in (WEIGHTS, CONFIG, CARD):
        (folder / name).write_bytes(read_bytes(source / name))
    return replace(settings, tokenizer_from=str(folder))


def _end_with(parent: int) -> None:
    """Be sent SIGTERM when the parent ends, however it does: nobody else would end this run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended before that was said
        sys.exit(75)


if __name__ == "__main__":
    run_program(Arguments, main, description=__doc__ or "")

"""Evaluation on the held-out clips of a data set: at the end of a run, and while it trains."""

from __future__ import annotations

from collections.abc import Callable

from flam_core.config import Config
from flam_core.config_evaluation import EvaluationConfig
from flam_core.data.quarantine import BadClip
from flam_core.evaluation.context import HeldOutClip
from flam_core.evaluation.evaluate import Evaluation, evaluate, measure
from flam_core.evaluation.held_out import held_out_clips
from flam_core.model import Flam
from services.feed import FeedSource


def evaluate_on(
    model: Flam,
    source: FeedSource,
    config: EvaluationConfig,
    seed: int,
    *,
    split: str = "test",
    on_broken: Callable[[BadClip], None],
) -> Evaluation:
    """Evaluate a model on the held-out episodes of a data set, without its quarantined clips.

    `on_broken` is told of each clip that turns out to be broken and is left out. Raises DataError if no clip is long
    enough.
    """
    clips, probes, long_clips = _read(source, config, split, on_broken)
    return evaluate(model, clips, probes, clips, config, seed, long_clips)


class EvaluationDuring:
    """What `config.evaluation.during` measures while FLAM trains, on the split `val`: `test` is for the end."""

    def __init__(self, config: Config, source: FeedSource) -> None:
        self._config, self._source = config, source
        self._clips: tuple[list[HeldOutClip], list[HeldOutClip], list[HeldOutClip]] | None = None

    def __call__(self, model: Flam, step: int) -> dict[str, float]:
        """The metrics of the model that are due after so many steps of the run; mostly none."""
        config = self._config.evaluation
        names = config.due(step - self._config.tokenizer_stage.steps)
        if not names:
            return {}
        if self._clips is None:
            # A clip that cannot be read is named at the end, if not by the feed before.
            self._clips = _read(self._source, config, "val", lambda _clip: None)
        clips, probes, long_clips = self._clips
        return measure(model, clips, probes, clips, config, self._config.seed, names, long_clips).metrics


def clips_of(
    source: FeedSource, split: str, frames: int, limit: int, *, on_broken: Callable[[BadClip], None]
) -> list[HeldOutClip]:
    """Up to `limit` windows of `frames` frames of a split, without its quarantined clips (`held_out_clips`)."""
    data, left_out = source.data, source.quarantine
    return held_out_clips(
        source.manifest, data.fs, data.path, split, frames, limit, quarantine=left_out, on_broken=on_broken
    )


def _read(
    source: FeedSource, config: EvaluationConfig, split: str, on_broken: Callable[[BadClip], None]
) -> tuple[list[HeldOutClip], list[HeldOutClip], list[HeldOutClip]]:
    """Clips to roll out and to probe, train clips to fit the probes on, and long clips."""
    frames = config.context + config.horizon
    longest = max(n for shard in source.manifest.split(split) for n in shard.clip_frames)
    long_frames = min(longest, config.context + config.long_horizon)
    return (
        clips_of(source, split, frames, max(config.clips, config.probe_clips), on_broken=on_broken),
        clips_of(source, "train", frames, config.probe_clips, on_broken=on_broken),
        clips_of(source, split, long_frames, config.long_clips, on_broken=on_broken),
    )

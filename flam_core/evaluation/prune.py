"""How many factors the data have, of a model that was given too many: prune it to those that its predictions need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flam_core.config_evaluation import EvaluationConfig
from flam_core.errors import SettingsError
from flam_core.evaluation.context import HeldOutClip
from flam_core.evaluation.evaluate import evaluate
from flam_core.evaluation.slots import used_slots
from flam_core.model.flam import Flam

_WATCHED = ("rollout/psnr@1", "rollout/psnr")
"""What must not fall: one step ahead, and over the whole rollout."""


@dataclass(frozen=True)
class Pruned:
    """A smaller model, and what it cost.

    kept: numbers of the slots in the model given. used: of those, what `slots/used` counts. before, after: dB of each
    of `rollout/psnr@1` and `rollout/psnr`.
    """

    model: Flam
    kept: tuple[int, ...]
    used: tuple[int, ...]
    before: dict[str, float]
    after: dict[str, float]


def prune(
    model: Flam, clips: Sequence[HeldOutClip], config: EvaluationConfig, seed: int, tolerance_db: float = 0.1
) -> Pruned:
    """Leave out slots as long as neither PSNR falls by more than `tolerance_db` below the whole model's.

    First all that are not in use; if that costs too much, one at a time. Then each that is left is tried, the one
    whose latent action matters least first. Raises SettingsError for a model without slots, DataError for clips that
    are too short.
    """
    if not model.has_slots:
        raise SettingsError("a model without slots has none to prune", fix="Use one with model.state slots.")
    whole = replace(config, measures=("rollout", "slots"))
    found = evaluate(model, clips, (), (), whole, seed).metrics
    before = {key: found[key] for key in _WATCHED}
    used = used_slots(found)
    by_effect = sorted(range(model.factors), key=lambda i: found.get(f"slots/{i}/effect_db", 0.0))

    def cost(keep: Sequence[int]) -> dict[str, float] | None:
        """The PSNRs with these slots alone, or None if one falls too far."""
        short = replace(config, measures=("rollout",))
        after = evaluate(model.pruned(list(keep)), clips, (), (), short, seed).metrics
        good = all(after[key] >= before[key] - tolerance_db for key in _WATCHED)
        return {key: after[key] for key in _WATCHED} if good else None

    kept, after = list(range(model.factors)), before
    if 0 < len(used) < model.factors and (found_after := cost(used)) is not None:
        kept, after = list(used), found_after
    for slot in by_effect:
        fewer = [i for i in kept if i != slot]
        if slot in kept and fewer and (found_after := cost(fewer)) is not None:
            kept, after = fewer, found_after
    return Pruned(model.pruned(kept), tuple(kept), tuple(used), before, after)

"""Two models on the same clips: which is better, and is that more than luck?"""

from __future__ import annotations

from flam_core.errors import DataError
from flam_core.evaluation.image import psnr
from flam_core.evaluation.rollout import RolloutResult
from flam_core.evaluation.stats import Bootstrap, Estimate


def psnr_gain(one: RolloutResult, other: RolloutResult, seed: int, *, other_source: str = "rollout") -> Estimate:
    """By how many dB the rollouts of `one` are better at their last step: a paired bootstrap over episodes.

    Both are of the same clips, and each resample draws the same episodes for both. `other_source`: what of `other`
    counts, such as "copy". Raises DataError if the clips are not the same.
    """
    if (one.ids, one.context, one.horizon) != (other.ids, other.context, other.horizon):
        raise DataError("two models were measured on different clips, so they cannot be compared", fix="Measure anew.")
    bootstrap = Bootstrap(one.episodes, seed)
    draws = [psnr(bootstrap.ratio(errors[:, -1])) for errors in (one.errors["rollout"], other.errors[other_source])]
    return bootstrap.estimate(draws[0] - draws[1])

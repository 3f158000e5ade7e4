"""What a sweep's numbers say: means over seeds, paired differences, the Pareto front, and what to try next.

Everything here is worked out from `sweep.json` alone. Trials that were stopped early are compared with others at the
newest step that both were measured at, never their middle with another's end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from flam_core.evaluation.stats import Estimate, over_seeds

Row = Mapping[str, Any]
"""A trial, as in `sweep.json`."""
SETTINGS = ("factors", "codebook", "latent_width", "beta", "fsq")
COLLAPSES = ("posterior-collapse", "idle-actions", "codebook-collapse", "tokenizer-dead")
_SILENT_BITS = 0.5
"""Latent actions that say less than this of a step say nothing that anyone could use."""
_FULL = 0.8
"""Share of a codebook in use above which a larger one may help."""


@dataclass(frozen=True)
class PointSummary:
    """A point over its seeds."""

    settings: Mapping[str, Any]
    estimates: Mapping[str, Estimate]
    """Of each metric, over the seeds that came to the end; empty if none did."""
    seeds: int
    """That came to the end."""
    stopped: Mapping[str, int]
    """How many were stopped, by what."""
    seconds: float
    """Mean wall time of a trial."""

    @property
    def label(self) -> str:
        """Such as `K=4 VQ-8`."""
        return label(self.settings)


@dataclass(frozen=True)
class Difference:
    """How much better one value of a setting is than another, all else and the seed equal."""

    setting: str
    value: Any
    other: Any
    estimate: Estimate
    """Of the main metric's difference, over pairs; above 0: `value` is better."""

    @property
    def verdict(self) -> str:
        """In words, by the interval."""
        low, high = self.estimate.low, self.estimate.high
        if low is None or high is None:
            return "one pair says nothing of the spread"
        return "better" if low > 0 else "worse" if high < 0 else "no difference that these trials show"


def label(settings: Mapping[str, Any]) -> str:
    """A point in few words."""
    latent = f"VQ-{settings['codebook']}" if settings["codebook"] else "Gaussian"
    return f"K={settings['factors']} {latent}"


def summaries(found: Mapping[str, Any]) -> list[PointSummary]:
    """One for each point, in the order of `sweep.json`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found["trials"]:
        groups.setdefault(tuple(row[name] for name in SETTINGS), []).append(row)
    made = []
    for values, rows in groups.items():
        ended = [row for row in rows if row["stopped_by"] is None]
        keys = sorted(set.intersection(*(set(row["metrics"]) for row in ended))) if ended else []
        made.append(
            PointSummary(
                dict(zip(SETTINGS, values, strict=True)),
                {key: over_seeds([row["metrics"][key] for row in ended]) for key in keys},
                len(ended),
                reasons(rows),
                mean(row["seconds"] for row in rows),
            )
        )
    return made


def reasons(rows: Sequence[Row]) -> Counter[str]:
    """What stopped how many of the trials."""
    return Counter(row["stopped_by"].partition(":")[0] for row in rows if row["stopped_by"])


def best(points: Sequence[PointSummary], metric: str) -> PointSummary | None:
    """By the mean of the main metric; None if no point came to its end."""
    known = [point for point in points if metric in point.estimates]
    return max(known, key=lambda point: point.estimates[metric].mean, default=None)


def best_trial(found: Mapping[str, Any]) -> Row | None:
    """Of the trials that came to their end, the one that was best at its last look, on the split `val`: the numbers on
    `test` are for others to judge by. None if there is none."""
    metric = found["objectives"][0]["metric"]
    ended = [row for row in found["trials"] if row["stopped_by"] is None and row["looks"]]
    known = [row for row in ended if metric in row["looks"][-1]["metrics"]]
    return max(known, key=lambda row: row["looks"][-1]["metrics"][metric], default=None)


def differences(found: Mapping[str, Any], setting: str) -> list[Difference]:
    """Of each value of a setting to each smaller one."""
    rows: list[Row] = found["trials"]
    metric = found["objectives"][0]["metric"]
    values = sorted({row[setting] for row in rows})
    made = []
    for i, value in enumerate(values):
        for other in values[:i]:
            pairs = list(_pairs(rows, setting, value, other, metric))
            if pairs:
                made.append(Difference(setting, value, other, over_seeds([a - b for a, b in pairs])))
    return made


def _pairs(rows: Sequence[Row], setting: str, value: Any, other: Any, metric: str) -> Iterator[tuple[float, float]]:
    """The main metric of trials that differ in one setting alone, at the newest step that both were measured at.

    The latent width may differ, too, where the sweep lets it follow the factors.
    """
    same = [name for name in (*SETTINGS, "seed") if name not in (setting, "latent_width")]
    of_other = {tuple(row[name] for name in same): row for row in rows if row[setting] == other}
    for row in rows:
        twin = of_other.get(tuple(row[name] for name in same))
        if row[setting] != value or twin is None:
            continue
        if row["stopped_by"] is None and twin["stopped_by"] is None:
            yield row["metrics"][metric], twin["metrics"][metric]
            continue
        looks = [{look["step"]: look["metrics"].get(metric) for look in one["looks"]} for one in (row, twin)]
        common = [s for s in looks[0] if s in looks[1] and None not in (looks[0][s], looks[1][s])]
        if common:
            yield looks[0][max(common)], looks[1][max(common)]


def pareto(points: Sequence[PointSummary], objectives: Sequence[Mapping[str, Any]]) -> list[PointSummary]:
    """The points that no other beats or equals in all objectives at once."""
    signs = [1 if goal["direction"] == "maximize" else -1 for goal in objectives]
    known = [point for point in points if objectives[0]["metric"] in point.estimates]
    vectors = [[sign * _mean(point, goal) for sign, goal in zip(signs, objectives, strict=True)] for point in known]
    return [
        point
        for point, own in zip(known, vectors, strict=True)
        if not any(other != own and all(b >= a for a, b in zip(own, other, strict=True)) for other in vectors)
    ]


def _mean(point: PointSummary, goal: Mapping[str, Any]) -> float:
    estimate = point.estimates.get(goal["metric"])
    return goal["worst"] if estimate is None else estimate.mean


def wanted_factors(found: Mapping[str, Any]) -> tuple[int, str] | None:
    """The fewest factors that no larger number is shown to beat, and how that is known; None without a comparison."""
    compared = differences(found, "factors")
    if not compared:
        return None
    values = sorted({one.value for one in compared} | {one.other for one in compared})
    for value in values:
        beaten = [one for one in compared if one.other == value and one.verdict == "better"]
        if not beaten:
            above = [one for one in compared if one.other == value]
            worst = max((one.estimate.mean for one in above), default=0.0)
            why = (
                f"no larger K is shown to be better (at most {worst:+.2f})"
                if above
                else "it is better than all smaller"
            )
            return value, why
    return None


def next_steps(found: Mapping[str, Any]) -> list[str]:
    """What to try next, in sentences that name the numbers they rest on."""
    points = summaries(found)
    metric = found["objectives"][0]["metric"]
    top = best(points, metric)
    said = [*_of_collapses(found["trials"])]
    if top is None:
        return [*said, "No trial came to its end: lower --reduction, or train for longer."]
    for advice in (_of_factors, _of_slots, _of_codebook, _of_seeds):
        said += advice(found, points, top)
    return said or ["Nothing stands out: more seeds would make the intervals narrower."]


def _of_collapses(rows: Sequence[Row]) -> Iterator[str]:
    lost = [row for row in rows if row["stopped_by"] in COLLAPSES]
    for name in dict.fromkeys(row["stopped_by"] for row in lost):
        mine = [row for row in lost if row["stopped_by"] == name]
        for beta in sorted({row["beta"] for row in mine}):
            there = [row for row in rows if row["beta"] == beta and not row["codebook"]]
            gone = [row for row in mine if row["beta"] == beta and not row["codebook"]]
            fine = [row["beta"] for row in rows if row["stopped_by"] is None and row["beta"] < beta]
            if gone and len(gone) == len(there) and fine:
                holds = max(fine)
                yield (
                    f"beta {beta:g} is over the cliff: all {len(there)} trials with it ended in {name}, and beta "
                    f"{holds:g} holds. Search between the two: --beta {holds:g},{(holds * beta) ** 0.5:.1g}."
                )
            elif gone:
                yield f"{len(gone)} of {len(there)} trials with beta {beta:g} ended in {name}: see docs/learning.md."
        if any(row["codebook"] for row in mine):
            sizes = sorted({row["codebook"] for row in mine if row["codebook"]})
            yield f"{name} with codebooks of {', '.join(map(str, sizes))}: see docs/learning.md."


def _of_factors(found: Mapping[str, Any], points: Sequence[PointSummary], top: PointSummary) -> Iterator[str]:
    values = sorted({row["factors"] for row in found["trials"]})
    wanted = wanted_factors(found)
    if wanted and wanted[0] == values[-1] and len(values) > 1:
        yield f"The largest K tried is the best one: try more, --factors {values[-1]},{2 * values[-1]}."
    if wanted and len(values) > 2 and values[0] < wanted[0] < values[-1]:
        below = max(value for value in values if value < wanted[0])
        if wanted[0] - below > 1:
            between = ",".join(str(k) for k in range(below + 1, wanted[0] + 1))
            yield f"K = {wanted[0]} suffices and K = {below} does not: narrow it down, --factors {between}."


def _of_slots(found: Mapping[str, Any], points: Sequence[PointSummary], top: PointSummary) -> Iterator[str]:
    used = top.estimates.get("slots/used")
    if used is not None and used.mean <= top.settings["factors"] - 1:
        yield (
            f"{top.label} uses {used.mean:.1f} of its {top.settings['factors']} slots: jobs/prune.py drops the rest "
            "without losing PSNR."
        )


def _of_codebook(found: Mapping[str, Any], points: Sequence[PointSummary], top: PointSummary) -> Iterator[str]:
    sizes = sorted({row["codebook"] for row in found["trials"] if row["codebook"]})
    largest = max(sizes, default=0)
    used = [
        point.estimates["actions/usage"].mean
        for point in points
        if largest and point.settings["codebook"] == largest and "actions/usage" in point.estimates
    ]
    if used and max(used) > _FULL:
        larger = f"--codebook {largest},{2 * largest}"
        yield f"Codebooks of {largest} are used to {max(used):.0%}: try larger ones, {larger}."
    bits = top.estimates.get("actions/bits")
    if bits is not None and bits.mean < _SILENT_BITS:
        yield f"The latent actions of {top.label} say {bits.mean:.2f} bits a step: lower --beta."


def _of_seeds(found: Mapping[str, Any], points: Sequence[PointSummary], top: PointSummary) -> Iterator[str]:
    if top.seeds < 3:
        yield f"The best point rests on {top.seeds} seed(s): --seeds 3 or more tells luck from merit."

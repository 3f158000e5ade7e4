"""How much the latent actions say of a transition: bits, and the share of codes or dimensions that are in use."""

from __future__ import annotations

import math

import numpy as np

from flam_core.evaluation.context import Context, Observed
from flam_core.evaluation.measure import Findings, Measure
from flam_core.evaluation.stats import Bootstrap, Estimate
from flam_core.learning.meters import ACTIVE_VARIANCE


def _run(context: Context) -> Findings:
    seen = context.held_out
    bootstrap = context.bootstrap(seen.clusters)
    estimates = _of_codes(context, seen, bootstrap) if seen.codes is not None else _of_gaussian(seen, bootstrap)
    return Findings(estimates)


def _of_gaussian(seen: Observed, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """The KL to N(0, I), and the dimensions whose mean varies (Burda et al. 2016)."""
    bits = bootstrap.ratio(seen.penalty.double().mean(dim=1).numpy() / math.log(2))  # [R, M]
    means = seen.actions.double().flatten(2).numpy()  # [N, T - 1, M A]
    first, second = bootstrap.ratio(means.mean(axis=1)), bootstrap.ratio((means**2).mean(axis=1))
    active = (second - first**2 > ACTIVE_VARIANCE).mean(axis=1)
    return _bits(bits, bootstrap) | {"actions/usage": bootstrap.estimate(active)}


def _of_codes(context: Context, seen: Observed, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """The entropy of each slot's codes; the perplexity of all codes together, as a share of the codebook."""
    assert seen.codes is not None
    size = context.model.dynamics.config.codebook
    counts = (seen.codes[..., None].numpy() == np.arange(size)).sum(axis=1).astype(np.float64)  # [N, M, codes]
    each, together = bootstrap.total(counts), bootstrap.total(counts.sum(axis=1))
    perplexity = np.exp2(_entropy(together))
    return _bits(_entropy(each), bootstrap) | {
        "actions/usage": bootstrap.estimate(perplexity / size),
        "actions/perplexity": bootstrap.estimate(perplexity),
    }


def _entropy(counts: np.ndarray) -> np.ndarray:
    """In bits, over the last axis."""
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-12)
    return -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(axis=-1)


def _bits(draws: np.ndarray, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Of draws [1 + resamples, M]."""
    each = {f"actions/{i}/bits": bootstrap.estimate(draws[:, i]) for i in range(draws.shape[1])}
    return {"actions/bits": bootstrap.estimate(draws.sum(axis=1)), **each}


USAGE = Measure("usage", "use of latent actions", ("latent actions",), _run)

"""Where slots may start from: what moves, sorted by looks.

Left to chance, several slots start on the same entity and some entity is nobody's, which training repairs slowly
or never (docs/devlog.md). Things that move are what latent actions are about, and they can be found without labels.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_SAME = 0.1
"""Typical features are one kind if they differ by less than this share of a patch's root mean square length."""

_SLOW = 0.03
"""A direction is slow if its variance from a frame to the next is below this share of its whole variance (that of noise
is 2)."""
_FLOOR = 1e-3
"""Share of the mean variance below which there is no direction: features are normalised, so one never varies."""
_FULL = 0.995
"""Quantile of the lengths of moving patches that counts as length 1. A thing fills a patch, or a part of it."""


def moving_prototypes(z_btpc: Tensor, count: int, seed: int) -> Tensor:
    """`count` typical features [count, C] of moving patches among standardised features [B, T, P, C].

    k-means over the patches that have mostly changed since the frame before (a thing came there; that something moved
    next to a wall does not make the wall a thing) and that stand out from the average patch (what a thing left behind
    is background). Not by direction: things that differ in brightness alone would share a start (docs/devlog.md).
    Where fewer than `count` things move, the rest are the patches of the sample that are least like those found.
    """
    patches = z_btpc[:, 1:].flatten(0, 2).double()
    energy = patches.pow(2).sum(dim=-1)
    changed = (z_btpc[:, 1:] - z_btpc[:, :-1]).double().pow(2).sum(dim=-1).flatten()
    arrived = patches[(changed > 0.5 * energy) & (energy > energy.mean())]
    if len(arrived) < count:  # hardly anything moves in this sample: then anything may be a start
        arrived = patches
    labels = torch.from_numpy(_clusters(arrived, count, seed).labels_).to(arrived.device)  # fewer kinds: see below
    sizes = torch.bincount(labels, minlength=count)
    same = _SAME * energy.mean().sqrt()
    found: list[Tensor] = []
    for i in sizes.argsort(descending=True, stable=True).tolist():
        centre = arrived[labels == i].mean(dim=0)
        if sizes[i] and all((centre - other).norm() > same for other in found):
            found.append(centre)
    distance = torch.stack([(patches - other).norm(dim=-1) for other in found]).amin(dim=0)
    while len(found) < count:
        found.append(patches[distance.argmax()])
        distance = distance.minimum((patches - found[-1]).norm(dim=-1))
    return torch.stack(found).to(z_btpc.dtype)


class SlowStart(NamedTuple):
    """directions [C, d]: features times these say what lies in a patch and how much of it, whichever way it lies there;
    a patch that is filled has about length 1. kinds [count, d]: unit vectors, one for each kind of thing."""

    directions: Tensor
    kinds: Tensor


def slow_start(z_btpc: Tensor, count: int, seed: int) -> SlowStart:
    """What stays the same of things that move, among standardised features [B, T, P, C] of square frames.

    Where things move by less than a patch, most of a feature tells how they lie in it, and patches that look alike are
    rarely of one thing. But what is added up over all patches that a thing touches changes only as far as the thing
    itself does. So: the directions in feature space in which sums over neighbourhoods vary least from frame to frame
    (slow feature analysis, Wiskott and Sejnowski 2002), two or more, `count` at most, and k-means of moving patches
    by their direction there, since a patch that a thing fills by half shows half of it.
    """
    z = z_btpc.double()
    z = z - z.flatten(0, 2).median(dim=0).values  # mostly background, which is not to fade at the frame's edge
    sums = _around(z)
    whole = (sums - sums.mean(dim=(0, 1, 2))).flatten(0, 2)
    variances, basis = torch.linalg.eigh(whole.T @ whole / len(whole))
    varies = variances >= _FLOOR * variances.mean()
    white = basis[:, varies] / variances[varies].clamp_min(1e-12).sqrt()
    steps = (sums[:, 1:] - sums[:, :-1]).flatten(0, 2) @ white
    slowness, slow = torch.linalg.eigh(steps.T @ steps / len(steps))
    number = min(max(2, int((slowness < _SLOW).sum())), count, len(slowness))
    directions = white @ slow[:, :number]

    patches = z @ directions
    lengths = patches.norm(dim=-1)
    changed = (patches[:, 1:] - patches[:, :-1]).norm(dim=-1)
    arrived = (changed.square() > 0.5 * lengths[:, 1:].square()) & (lengths[:, 1:] > lengths.mean())
    moving = patches[:, 1:][arrived] if int(arrived.sum()) >= count else patches.flatten(0, 2)
    size = moving.norm(dim=-1).clamp_min(1e-12)
    found = _clusters(moving / size[:, None], count, seed, size)
    kinds = F.normalize(torch.from_numpy(found.cluster_centers_).to(z), dim=-1)
    full = size.quantile(_FULL).clamp_min(1e-6)
    return SlowStart((directions / full).to(z_btpc.dtype), kinds.to(z_btpc.dtype))


def _clusters(rows: Tensor, count: int, seed: int, weights: Tensor | None = None) -> Any:
    """scikit-learn's KMeans, fitted to rows [n, C] with weights [n]. Of fewer kinds, some clusters are empty."""
    from sklearn.cluster import KMeans  # a second, once in a run, which no other start need wait for
    from sklearn.exceptions import ConvergenceWarning

    means = KMeans(count, n_init=16, random_state=seed)  # pyright: ignore[reportArgumentType] - the stub wants "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # which is how it says so
        return means.fit(rows.cpu().numpy(), sample_weight=None if weights is None else weights.cpu().numpy())


def _around(z_btpc: Tensor) -> Tensor:
    """Means [B, T, P, C] over the neighbourhood of each patch, half as wide as the frame, which fade towards its edge:
    what moves on inside of it changes them little."""
    batch, side = len(z_btpc), round(z_btpc.shape[2] ** 0.5)
    planes = rearrange(z_btpc, "b t (h w) c -> (b t) c h w", h=side)
    width = side // 4 * 2 + 1
    for _ in range(2):
        planes = F.avg_pool2d(planes, width, stride=1, padding=width // 2)
    return rearrange(planes, "(b t) c h w -> b t (h w) c", b=batch)

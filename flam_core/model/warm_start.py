"""Where slots may start from: what moves, sorted by looks.

Left to chance, several slots start on the same entity and some entity is nobody's, which training repairs slowly
or never (docs/devlog.md). Things that move are what latent actions are about, and they can be found without labels.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

_SAME = 0.1
"""Typical features are one kind if they differ by less than this share of a patch's root mean square length."""


def moving_prototypes(z_btpc: Tensor, count: int, seed: int) -> Tensor:
    """`count` typical features [count, C] of moving patches among standardised features [B, T, P, C].

    k-means over the patches that have mostly changed since the frame before (a thing came there; that something moved
    next to a wall does not make the wall a thing) and that stand out from the average patch (what a thing left behind
    is background). Not by direction: things that differ in brightness alone would share a start (docs/devlog.md).
    Where fewer than `count` things move, the rest are the patches of the sample that are least like those found.
    """
    from sklearn.cluster import KMeans  # a second, once in a run, which no other start need wait for
    from sklearn.exceptions import ConvergenceWarning

    patches = z_btpc[:, 1:].flatten(0, 2).double()
    energy = patches.pow(2).sum(dim=-1)
    changed = (z_btpc[:, 1:] - z_btpc[:, :-1]).double().pow(2).sum(dim=-1).flatten()
    arrived = patches[(changed > 0.5 * energy) & (energy > energy.mean())]
    if len(arrived) < count:  # hardly anything moves in this sample: then anything may be a start
        arrived = patches
    means = KMeans(count, n_init=16, random_state=seed)  # pyright: ignore[reportArgumentType] - the stub wants "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer kinds than clusters, which is seen to below
        labels = torch.from_numpy(means.fit_predict(arrived.cpu().numpy())).to(arrived.device)
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

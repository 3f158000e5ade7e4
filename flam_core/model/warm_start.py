"""Where slots may start from: what moves, sorted by looks.

Left to chance, several slots start on the same entity and some entity is nobody's, which training repairs slowly
or never (docs/devlog.md). Things that move are what latent actions are about, and they can be found without labels.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor


def moving_prototypes(z_btpc: Tensor, count: int, seed: int) -> Tensor:
    """`count` typical features [count, C] of moving patches among standardised features [B, T, P, C].

    k-means over all patches, each weighted by how much it has just changed and by how far it is from the average patch
    (so that what a thing left behind, which is background, does not count as a thing).
    """
    changed = (z_btpc[:, 1:] - z_btpc[:, :-1]).pow(2).sum(dim=-1)
    patches = z_btpc[:, 1:]
    weights = (changed * patches.pow(2).sum(dim=-1).pow(2)).flatten().double().cpu().numpy()
    points = patches.flatten(0, 2).double().cpu().numpy()
    weights = weights / max(weights.max(), np.finfo(np.float64).tiny)
    if np.count_nonzero(weights) < count:  # nothing moves in this sample: then anything may be a start
        weights = np.ones_like(weights)
    means = KMeans(count, n_init=8, random_state=seed)  # pyright: ignore[reportArgumentType] - the stub wants "auto"
    found = means.fit(points, sample_weight=weights)
    return torch.from_numpy(found.cluster_centers_).to(z_btpc)

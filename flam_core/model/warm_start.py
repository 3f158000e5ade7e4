"""Where slots may start from: what moves, sorted by looks.

Left to chance, several slots start on the same entity and some entity is nobody's, which training repairs slowly
or never (docs/devlog.md). Things that move are what latent actions are about, and they can be found without labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor


def moving_prototypes(z_btpc: Tensor, count: int, seed: int) -> Tensor:
    """`count` typical features [count, C] of moving patches among standardised features [B, T, P, C].

    k-means by direction over the patches that have mostly changed since the frame before (a thing came there; that
    something moved next to a wall does not make the wall a thing) and that stand out from the average patch (what a
    thing left behind is background). By direction, so that bright things do not outvote dim ones.
    """
    patches = z_btpc[:, 1:].flatten(0, 2).double()
    energy = patches.pow(2).sum(dim=-1)
    changed = (z_btpc[:, 1:] - z_btpc[:, :-1]).double().pow(2).sum(dim=-1).flatten()
    arrived = patches[(changed > 0.5 * energy) & (energy > energy.mean())]
    if len(arrived) < count:  # hardly anything moves in this sample: then anything may be a start
        arrived = patches
    directions = F.normalize(arrived, dim=-1).cpu().numpy()
    means = KMeans(count, n_init=16, random_state=seed)  # pyright: ignore[reportArgumentType] - the stub wants "auto"
    labels = torch.from_numpy(means.fit_predict(directions)).to(arrived.device)
    return torch.stack([arrived[labels == i].mean(dim=0) for i in range(count)]).to(z_btpc.dtype)

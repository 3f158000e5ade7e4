"""What ranks that train together do together. Without `torch.distributed` every function is that of one rank alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flam_core.data.order import rank_slice


@dataclass(frozen=True)
class Share:
    """The part of each global batch that a rank trains on."""

    rank: int = 0
    world: int = 1
    at_a_time: int | None = None
    """Clips that go through the model at a time; gradients of several such parts add up. None: all."""

    def places(self, batch: int) -> range:
        """Of the global batch of `batch` clips, those that are this rank's."""
        part = rank_slice(batch, self.rank, self.world)
        return range(part.start, part.stop)

    def parts(self, clips: int) -> list[slice]:
        """Of this rank's clips, those that go through the model together."""
        size = min(self.at_a_time or clips, clips)
        return [slice(first, min(first + size, clips)) for first in range(0, clips, size)]


def together() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def add_up(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on each; in place."""
    if together():
        dist.all_reduce(values)
    return values


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, in order; ranks may have different numbers of them (a broken clip is left out)."""
    if not together():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    lengths = [int(count) for count in counts]
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def without_sync(module: nn.Module) -> AbstractContextManager[object]:
    """For the backward passes before the last of a step: their gradients need not be summed over ranks yet."""
    no_sync = getattr(module, "no_sync", None)  # of DistributedDataParallel
    return nullcontext() if no_sync is None else no_sync()

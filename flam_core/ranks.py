"""What ranks that train together do together. Without `torch.distributed` every function is that of one rank alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flam_core.data.order import rank_slice

if TYPE_CHECKING:  # it takes more than a second to import them, which only runs that share out weights should wait for
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


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

    def rounds(self, batch: int) -> int:
        """Parts of the rank that has most clips of a global batch: so often all ranks together go through a model whose
        weights they share out."""
        most = math.ceil(batch / self.world)
        return len(self.parts(most))


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


def shard(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    """Share out weights, gradients and optimiser state of a module's parts of these kinds among the ranks (FSDP2).

    A part's weights are whole only while it computes. What lies outside such parts, little, is on every rank:
    `average_gradients` is for these.
    """
    from torch.distributed.fsdp import fully_shard

    for part in module.modules():
        if isinstance(part, kinds):
            fully_shard(part)
    return module


def _in_parts(value: Tensor) -> TypeGuard[DTensor]:
    """Whether it is shared out among ranks; nothing is, where what does so was never imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def sharded(module: nn.Module) -> bool:
    """Whether some of its weights are shared out among ranks."""
    return any(_in_parts(weight) for weight in module.parameters())


def average_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Give all ranks the mean of their gradients, of weights that are whole on each."""
    gradients = [one.grad for one in weights if one.grad is not None and not _in_parts(one.grad)]
    if not gradients:
        return
    flat = add_up(torch.cat([one.reshape(-1) for one in gradients])) / dist.get_world_size()
    for one, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        one.copy_(mean.view_as(one))


def clip_norm(weights: list[nn.Parameter], limit: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, also where some gradients are shared out among ranks; the norm before."""
    gradients = [one.grad for one in weights if one.grad is not None]
    parts = [one for one in gradients if _in_parts(one)]
    if not parts:
        return nn.utils.clip_grad_norm_(weights, limit)
    squares = torch.zeros((), device=gradients[0].device)
    for one in parts:
        squares = squares + one.to_local().float().square().sum()
    squares = add_up(squares)
    for one in gradients:
        if not _in_parts(one):
            squares = squares + one.float().square().sum()
    norm = squares.sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for one in gradients:
        (one.to_local() if _in_parts(one) else one).mul_(scale)
    return norm


def apart_by_kind(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that are whole on each rank, and those that are shared out; without what is empty."""
    groups = [[one for one in weights if _in_parts(one) is shared] for shared in (False, True)]
    return [group for group in groups if group]


def as_part(value: Tensor, weight: Tensor) -> Tensor:
    """A tensor as a weight of its shape lies on this rank: the opposite of `whole`."""
    if _in_parts(weight) and value.shape == weight.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, weight.device_mesh, weight.placements)
    return value


def whole(value: Tensor) -> Tensor:
    """A weight that may be shared out among ranks, as it is on one rank alone. All ranks must call it."""
    return value.full_tensor() if _in_parts(value) else value


def without_sync(module: nn.Module) -> AbstractContextManager[object]:
    """For the backward passes before the last of a step: their gradients need not be summed over ranks yet."""
    no_sync = getattr(module, "no_sync", None)  # of DistributedDataParallel
    if no_sync is not None:
        return no_sync()
    if not sharded(module):
        return nullcontext()
    from torch.distributed.fsdp import FSDPModule

    return _parts_without_sync([part for part in module.modules() if isinstance(part, FSDPModule)])


@contextmanager
def _parts_without_sync(parts: Sequence[FSDPModule]) -> Iterator[None]:
    for part in parts:
        part.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True)

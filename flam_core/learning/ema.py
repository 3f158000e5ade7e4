"""A running mean of the weights, which often predicts better than the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flam_core.ranks import as_part, whole


class WeightMean:
    """Exponential moving average of a module's weights and floating-point buffers, in float32.

    Early on the mean is over the steps so far, so that it does not remember where they started.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay, self.steps = decay, 0
        self._names = [name for name, value in module.state_dict().items() if value.is_floating_point()]
        self._module = module
        self._mean = [value.detach().float().clone() for value in self._values()]

    def _values(self) -> list[Tensor]:
        state = self._module.state_dict()
        return [state[name] for name in self._names]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after a step."""
        self.steps += 1
        weight = max(1 - self._decay, 1 / self.steps)
        for mean, value in zip(self._mean, self._values(), strict=True):
            mean.lerp_(value.float(), weight)

    def state(self) -> dict[str, Tensor]:
        """The mean of each weight, by its name in the module. All ranks must call it."""
        return {name: whole(mean) for name, mean in zip(self._names, self._mean, strict=True)}

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Go on from what `state` gave after so many steps."""
        self.steps = steps
        for name, mean in zip(self._names, self._mean, strict=True):
            mean.copy_(as_part(state[name].to(mean.device), mean))

    @torch.no_grad()
    def put_into(self, module: nn.Module) -> None:
        """Give a module of the same shape the mean as its weights."""
        state = module.state_dict()
        for name, mean in zip(self._names, self._mean, strict=True):
            state[name].copy_(mean)

"""Bits and use of latent actions, against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flam_core.evaluation.measure import Findings
from flam_core.evaluation.usage import USAGE
from flam_core.model.latent_action import LatentActions
from tests.evaluation_fixture import Oracle, context, noise, stub


class Coder(Oracle):
    """Slot 0 uses two of its codes in turn, slot 1 keeps to one; the codebook has four."""

    def __init__(self, factors: int = 2, offset: float = 0.0, latent: str = "vq") -> None:
        super().__init__(factors, offset, latent)
        self.dynamics.config.codebook = 4

    def infer(self, slots: Tensor, true_actions: Tensor | None = None) -> LatentActions:
        actions = slots[:, 1:]
        shape = actions.shape[:3]
        codes = torch.zeros(shape, dtype=torch.int64)
        codes[:, :, 0] = 1 + torch.arange(len(slots))[:, None] % 2
        return LatentActions(actions, actions, torch.zeros(shape), codes)


class Still(Oracle):
    """Infers the same from everything, with a KL of so many nats a slot."""

    def infer(self, slots: Tensor, true_actions: Tensor | None = None) -> LatentActions:
        actions = torch.ones_like(slots[:, 1:])
        return LatentActions(actions, actions, torch.tensor([1.0, 3.0]).expand(actions.shape[:3]))


def usage(model: type[Oracle], clips: int = 6) -> Findings:
    return USAGE.run(context(stub(model), noise(clips=clips)))


def test_codes_are_counted_in_bits() -> None:
    found = usage(Coder).metrics
    assert found["actions/0/bits"] == pytest.approx(1.0)  # two codes, equally often
    assert found["actions/1/bits"] == pytest.approx(0.0)
    assert found["actions/bits"] == pytest.approx(1.0)
    shares = np.array([0.5, 0.25, 0.25])  # code 0 in slot 1, codes 1 and 2 in slot 0
    perplexity = math.exp(-(shares * np.log(shares)).sum())
    assert found["actions/perplexity"] == pytest.approx(perplexity)
    assert found["actions/usage"] == pytest.approx(perplexity / 4)


def test_nats_are_told_in_bits_and_what_never_varies_is_not_in_use() -> None:
    found = usage(Still).metrics
    assert found["actions/0/bits"] == pytest.approx(1 / math.log(2))
    assert found["actions/bits"] == pytest.approx(4 / math.log(2))
    assert found["actions/usage"] == 0.0
    assert "actions/perplexity" not in found
    assert usage(Oracle).metrics["actions/usage"] == 1.0


def test_the_spread_is_over_episodes() -> None:
    found = usage(Coder)
    assert found.estimates["actions/0/bits"].n == 6
    assert found.estimates["actions/0/bits"].se > 0

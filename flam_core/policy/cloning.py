"""Behaviour cloning: a policy learns the actions, or the probabilities of actions, that frames are labelled with."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flam_core.config import StageConfig
from flam_core.errors import TrainingFailed
from flam_core.learning.schedule import autocast_dtype, learning_rate
from flam_core.policy.config import PolicyConfig
from flam_core.policy.demonstrations import Demonstrations
from flam_core.policy.network import PolicyNetwork

_CLIP_NORM = 1.0
_WARMUP = 50
_EVALUATED = 256


def clone(
    demonstrations: Demonstrations,
    chosen: np.ndarray,
    targets: np.ndarray,
    config: PolicyConfig,
    seed: int,
    device: torch.device,
    held_out: np.ndarray | None = None,
) -> PolicyNetwork:
    """A policy after `config.steps` steps of cross-entropy on the chosen transitions, each as often as the others.

    chosen: int64 [n], numbers of transitions. targets: float32 [n, choices], the probability of each action. held_out:
    int64 [m], transitions whose true actions decide which policy is taken, of `config.looks` on the way; without them
    it is the last. Equal seeds on one device and number of threads give equal weights. Raises TrainingFailed if the
    loss is not finite.
    """
    torch.manual_seed(seed)
    size, choices = demonstrations.frames.shape[1], targets.shape[1]
    policy = PolicyNetwork(config, size, choices).to(device)
    optimiser = torch.optim.AdamW(policy.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    stage = StageConfig(config.steps, config.batch, 1, learning_rate=config.learning_rate, warmup=_WARMUP)
    dtype = autocast_dtype(config.precision, device)
    rng = np.random.default_rng((seed, 1))
    order = np.empty(0, dtype=np.int64)
    looks = _looks(config) if held_out is not None and len(held_out) else set()
    best, least = {}, math.inf
    for step in range(config.steps):
        while len(order) < config.batch:
            order = np.concatenate([order, rng.permutation(len(chosen))])
        batch, order = order[: config.batch], order[config.batch :]
        frames = torch.from_numpy(demonstrations.stacked(chosen[batch], config.stack)).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = policy(frames)
        loss = F.cross_entropy(logits, torch.from_numpy(targets[batch]).to(device))
        if not torch.isfinite(loss):
            raise TrainingFailed(f"the policy's loss is {loss.item()} at step {step}", fix="Lower its learning rate.")
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(stage, step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), _CLIP_NORM)
        optimiser.step()
        if held_out is not None and step + 1 in looks and (loss_now := _loss(policy, demonstrations, held_out)) < least:
            least, best = loss_now, {name: value.clone() for name, value in policy.state_dict().items()}
    if best:
        policy.load_state_dict(best)
    return policy.eval()


def _looks(config: PolicyConfig) -> set[int]:
    """The steps after which a policy is tried: evenly spread, the last among them."""
    return {round((i + 1) * config.steps / config.looks) for i in range(config.looks)}


def _loss(policy: PolicyNetwork, demonstrations: Demonstrations, chosen: np.ndarray) -> float:
    """Mean cross-entropy with the true actions of the chosen transitions int64 [n]."""
    truth = torch.from_numpy(demonstrations.actions[chosen])
    return F.cross_entropy(_logits(policy, demonstrations, chosen), truth).item()


def top_actions(policy: PolicyNetwork, demonstrations: Demonstrations, chosen: np.ndarray) -> np.ndarray:
    """The action int64 [n] that a policy thinks most probable at each of the chosen transitions int64 [n]."""
    return _logits(policy, demonstrations, chosen).argmax(dim=1).numpy()


@torch.no_grad()
def _logits(policy: PolicyNetwork, demonstrations: Demonstrations, chosen: np.ndarray) -> Tensor:
    """float32 [n, choices], on the CPU."""
    device = policy.head.weight.device
    found = [torch.empty(0, policy.choices)]
    for start in range(0, len(chosen), _EVALUATED):
        frames = demonstrations.stacked(chosen[start : start + _EVALUATED], policy.config.stack)
        found.append(policy(torch.from_numpy(frames).to(device)).cpu())
    return torch.cat(found)

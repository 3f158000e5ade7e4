"""LPIPS and FVD, where the user gives the weights of their networks by path and SHA-256. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from flam_core.config_evaluation import EvaluationConfig
from flam_core.errors import DataError, SettingsError
from flam_core.evaluation.context import Context
from flam_core.evaluation.i3d import CLASSES, MIN_FRAMES, I3d
from flam_core.evaluation.lpips import MIN_SIDE, Lpips
from flam_core.evaluation.measure import Findings, Measure
from flam_core.evaluation.rollout import evaluate_rollouts

NetworkT = TypeVar("NetworkT", bound=nn.Module)

_FRAMES = 64
"""Frames that go through AlexNet at a time."""
_VIDEOS = 4
"""Videos that go through I3D at a time."""


def check_weights(config: EvaluationConfig) -> None:
    """Raise SettingsError if weights that the config names are not what they should be: before training, not after."""
    if config.lpips_weights is not None:
        lpips_network(config)
    if config.fvd_weights is not None:
        fvd_network(config)


def lpips_network(config: EvaluationConfig) -> Lpips:
    """LPIPS with the config's weights. Raises SettingsError as `check_weights` does."""
    return _loaded(Lpips(), "lpips", config.lpips_weights, config.lpips_sha256)


def fvd_network(config: EvaluationConfig) -> I3d:
    """I3D with the config's weights. Raises SettingsError as `check_weights` does."""
    return _loaded(I3d(), "fvd", config.fvd_weights, config.fvd_sha256)


def _loaded(network: NetworkT, name: str, path: str | None, sha256: str | None) -> NetworkT:
    """The network with the weights of a safetensors file, in evaluation mode; other tensors in the file are left."""
    if path is None or sha256 is None:
        raise SettingsError(f"evaluation.{name}_weights is not given", fix="Give the file and its SHA-256.")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(
            f"evaluation.{name}_weights {path} cannot be read: {error.strerror}", fix="Give a local file."
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != sha256.lower():
        raise SettingsError(
            f"{path} has SHA-256 {found}, not evaluation.{name}_sha256 {sha256}", fix="Is it the file that you mean?"
        )
    try:
        weights = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise SettingsError(
            f"{path} is not a safetensors file: {error}", fix="Convert it (docs/metrics.md); pickles are refused."
        ) from error
    own = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    odd = [key for key, value in own.items() if key not in weights or weights[key].shape != value.shape]
    if odd:
        raise SettingsError(
            f"{path} lacks {len(odd)} of {len(own)} tensors of that shape, such as {odd[0]} {tuple(own[odd[0]].shape)}",
            fix="docs/metrics.md says which file is meant.",
        )
    network.load_state_dict({key: weights[key] for key in own}, strict=False)
    return network.eval()


def _lpips(context: Context) -> Findings:
    if context.config.lpips_weights is None:
        raise DataError("no weights are given (evaluation.lpips_weights)", fix="docs/metrics.md says which.")
    side = min(context.held_out.frames.shape[2:4])
    if side < MIN_SIDE:
        raise DataError(f"frames of {side} pixels are smaller than the {MIN_SIDE} it needs", fix="Use larger frames.")
    network = lpips_network(context.config).to(context.device)
    truth = context.held_out.frames[:, context.config.context :]
    bootstrap = context.bootstrap(context.held_out.clusters)
    estimates = {}
    for source, frames in _futures(context).items():
        distances = [
            network(_unit_range(context, a), _unit_range(context, b)).double().cpu().numpy()
            for a, b in zip(frames.flatten(0, 1).split(_FRAMES), truth.flatten(0, 1).split(_FRAMES), strict=True)
        ]
        draws = bootstrap.ratio(np.concatenate(distances).reshape(truth.shape[:2]))
        estimates[f"lpips/{source}"] = bootstrap.estimate(draws.mean(axis=1))
        estimates |= {f"lpips/{source}@{k + 1}": bootstrap.estimate(draws[:, k]) for k in range(draws.shape[1])}
    return Findings(estimates)


def _fvd(context: Context) -> Findings:
    if context.config.fvd_weights is None:
        raise DataError("no weights are given (evaluation.fvd_weights)", fix="docs/metrics.md says which.")
    if context.frames < MIN_FRAMES:
        raise DataError(
            f"clips of {context.frames} frames are shorter than the {MIN_FRAMES} it needs", fix="Raise the horizon."
        )
    network = fvd_network(context.config).to(context.device)
    seen = context.held_out
    given = seen.frames[:, : context.config.context]

    def features(videos: Tensor) -> np.ndarray:
        parts = [network(_unit_range(context, part)).double().cpu().numpy() for part in videos.split(_VIDEOS)]
        return np.concatenate(parts)

    truth = features(seen.frames)
    values = {
        f"fvd/{source}": frechet_distance(truth, features(torch.cat([given, future], dim=1)))
        for source, future in _futures(context).items()
    }
    notes = ()
    if len(seen.clips) <= CLASSES:
        notes = (
            f"FVD is of {len(seen.clips)} clips: compare it with values from as many alone, and with few it is high.",
        )
    return Findings(values=values, notes=notes)


def _futures(context: Context) -> dict[str, Tensor]:
    """Predicted frames uint8 [N, horizon, H, W, 3] of each source."""
    result = context.shared(evaluate_rollouts)
    known = context.held_out.frames[:, : context.config.context]
    copied = known[:, -1:].expand(-1, context.config.horizon, -1, -1, -1)
    return {source: torch.from_numpy(frames) for source, frames in result.predicted.items()} | {"copy": copied}


def _unit_range(context: Context, frames_u8: Tensor) -> Tensor:
    return frames_u8.to(context.device).float() / 255


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions that fit features [n, D] and [m, D], n and m at least 2.

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)) with covariances A and B, of which the last trace is the sum of
    the singular values of the centred features' product: no square root of a (singular) matrix is needed.
    """
    x, y = ((f - f.mean(axis=0)) / np.sqrt(len(f) - 1) for f in (a, b))
    shift = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(max(shift + np.square(x).sum() + np.square(y).sum() - 2 * overlap, 0.0))


LPIPS = Measure("lpips", "LPIPS", (), torch.inference_mode()(_lpips))
FVD = Measure("fvd", "FVD", (), torch.inference_mode()(_fvd))

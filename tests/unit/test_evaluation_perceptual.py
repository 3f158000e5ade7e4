"""LPIPS and FVD: the networks with random weights, the distances where they are known, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy.linalg import sqrtm
from torch import nn

from flam_core.config_evaluation import EvaluationConfig
from flam_core.errors import DataError, SettingsError
from flam_core.evaluation.i3d import I3d
from flam_core.evaluation.lpips import MIN_SIDE, Lpips
from flam_core.evaluation.perceptual import FVD, LPIPS, check_weights, frechet_distance, lpips_network
from tests.evaluation_fixture import CONFIG, Oracle, context, stub


def stored(network: nn.Module, path: Path) -> tuple[str, str]:
    """A network's weights as a file, and its SHA-256."""
    safetensors.torch.save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()


def random_lpips(seed: int = 0) -> Lpips:
    """With weights of the linear layers that are not negative, as the trained ones."""
    torch.manual_seed(seed)
    network = Lpips().eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.startswith("lin"):
                weight.abs_()
    return network


@pytest.fixture
def lpips_config(tmp_path: Path) -> EvaluationConfig:
    path, sha256 = stored(random_lpips(), tmp_path / "lpips.safetensors")
    return replace(CONFIG, lpips_weights=path, lpips_sha256=sha256)


def pictures(count: int = 3, frames: int = 4, side: int = 40) -> torch.Tensor:
    """Smooth random frames uint8 [count, frames, side, side, 3]."""
    coarse = torch.rand(count * frames, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (smooth.permute(0, 2, 3, 1).unflatten(0, (count, frames)) * 255).to(torch.uint8)


@torch.no_grad()
def test_lpips_is_a_distance_that_grows_with_noise() -> None:
    network = random_lpips()
    a = pictures()[:, 0].float() / 255
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    assert network(a, a).tolist() == [0.0] * 3
    distances = [network(a, (a + level * noise).clamp(0, 1)) for level in (0.01, 0.05, 0.2)]
    assert (torch.stack(distances).diff(dim=0) > 0).all()
    b = a.flip(0)
    torch.testing.assert_close(network(a, b), network(b, a))
    assert network(a, b)[0] > 0


@torch.no_grad()
def test_lpips_of_one_layer_equals_the_formula() -> None:
    """With all linear layers but the first zero: the weighted squared distance of unit features."""
    network = random_lpips()
    for i in range(1, 5):
        getattr(network, f"lin{i}").model[1].weight.zero_()
    a, b = (pictures()[:, t].float() / 255 for t in (0, 1))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    units = []
    for frames in (a, b):
        x = nn.functional.relu(network.features[0](((2 * frames - 1 - shift) / scale).permute(0, 3, 1, 2)))
        units.append(x / x.pow(2).sum(dim=1, keepdim=True).sqrt())
    weights = network.get_parameter("lin0.model.1.weight")[0, :, 0, 0]
    expected = ((units[0] - units[1]) ** 2 * weights[:, None, None]).sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(network(a, b), expected)


def test_lpips_has_the_tensors_of_the_public_files() -> None:
    shapes = {key: tuple(value.shape) for key, value in Lpips().state_dict().items()}
    assert shapes == {
        **{"features.0.weight": (64, 3, 11, 11), "features.0.bias": (64,)},
        **{"features.3.weight": (192, 64, 5, 5), "features.3.bias": (192,)},
        **{"features.6.weight": (384, 192, 3, 3), "features.6.bias": (384,)},
        **{"features.8.weight": (256, 384, 3, 3), "features.8.bias": (256,)},
        **{"features.10.weight": (256, 256, 3, 3), "features.10.bias": (256,)},
        **{f"lin{i}.model.1.weight": (1, n, 1, 1) for i, n in enumerate((64, 192, 384, 256, 256))},
    }


def test_lpips_is_measured_with_weights_and_absent_without(lpips_config: EvaluationConfig) -> None:
    clips = pictures()
    found = LPIPS.run(context(stub(Oracle), clips, lpips_config))
    keys = {f"lpips/{source}{at}" for source in ("rollout", "copy", "shuffled", "ceiling") for at in ("", "@1", "@3")}
    assert keys <= set(found.estimates)
    assert found.metrics["lpips/rollout"] == found.metrics["lpips/ceiling@2"] == 0.0
    assert found.metrics["lpips/shuffled"] > 0
    network = lpips_network(lpips_config)
    with torch.no_grad():
        by_hand = network(clips[:, 0].float() / 255, clips[:, 3].float() / 255).mean()
    assert found.metrics["lpips/copy@3"] == pytest.approx(float(by_hand), rel=1e-4)
    with pytest.raises(DataError, match=r"no weights are given \(evaluation.lpips_weights\)"):
        LPIPS.run(context(stub(Oracle), clips))
    with pytest.raises(DataError, match=f"frames of {MIN_SIDE - 1} pixels"):
        LPIPS.run(context(stub(Oracle), pictures(side=MIN_SIDE - 1), lpips_config))
    assert LPIPS.run(context(stub(Oracle), pictures(side=MIN_SIDE), lpips_config)).estimates


def test_weights_that_are_not_those_that_were_meant_are_refused(lpips_config: EvaluationConfig, tmp_path: Path) -> None:
    check_weights(lpips_config)
    check_weights(CONFIG)
    with pytest.raises(SettingsError, match="has SHA-256"):
        check_weights(replace(lpips_config, lpips_sha256="0" * 64))
    with pytest.raises(SettingsError, match="cannot be read"):
        check_weights(replace(lpips_config, lpips_weights=str(tmp_path / "none.safetensors")))
    pickled = tmp_path / "weights.pth"
    pickled.write_bytes(pickle.dumps(1))
    with pytest.raises(SettingsError, match="not a safetensors file"):
        check_weights(
            replace(
                lpips_config,
                lpips_weights=str(pickled),
                lpips_sha256=hashlib.sha256(pickled.read_bytes()).hexdigest(),
            )
        )
    path, sha256 = stored(Lpips().features, tmp_path / "features.safetensors")
    with pytest.raises(SettingsError, match=r"lacks 15 of 15 tensors .* features.0.weight \(64, 3, 11, 11\)"):
        check_weights(replace(lpips_config, lpips_weights=path, lpips_sha256=sha256))
    with pytest.raises(SettingsError, match=r"lacks .* Conv3d_1a_7x7"):
        check_weights(replace(lpips_config, fvd_weights=path, fvd_sha256=sha256))


def test_i3d_has_the_tensors_of_the_public_file() -> None:
    weights = I3d().state_dict()
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    assert shapes["Conv3d_1a_7x7.conv3d.weight"] == (64, 3, 7, 7, 7)
    assert shapes["Conv3d_1a_7x7.bn.running_var"] == (64,)
    assert shapes["Mixed_3b.b1b.conv3d.weight"] == (128, 96, 3, 3, 3)
    assert shapes["Mixed_5c.b3b.conv3d.weight"] == (128, 832, 1, 1, 1)
    assert shapes["logits.conv3d.weight"] == (400, 1024, 1, 1, 1)
    assert shapes["logits.conv3d.bias"] == (400,)
    assert "Conv3d_1a_7x7.conv3d.bias" not in shapes
    assert sum(value.numel() for key, value in weights.items() if ".conv3d." in key) == 12_682_704


def test_fvd_of_a_perfect_model_is_zero_and_of_a_copy_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, sha256 = stored(I3d(), tmp_path / "i3d.safetensors")
    config = replace(CONFIG, horizon=8, clips=2, fvd_weights=path, fvd_sha256=sha256)
    clips = pictures(count=2, frames=9)
    found = FVD.run(context(stub(Oracle), clips, config))
    assert set(found.values) == {f"fvd/{source}" for source in ("rollout", "copy", "shuffled", "ceiling")}
    scale = found.values["fvd/copy"]
    assert scale > 0
    assert found.values["fvd/rollout"] == pytest.approx(0, abs=1e-6 * scale)
    assert "2 clips" in found.notes[0]
    with pytest.raises(DataError, match="clips of 4 frames"):
        FVD.run(context(stub(Oracle), pictures(), replace(config, horizon=3)))
    with pytest.raises(DataError, match="no weights are given"):
        FVD.run(context(stub(Oracle), clips))


def test_frechet_distance_equals_values_known_by_hand() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5))
    total = np.cov(a, rowvar=False).trace()
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 5)
    assert frechet_distance(a, 3 * (a - a.mean(axis=0)) + a.mean(axis=0)) == pytest.approx(4 * total)
    b = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + np.trace(first + second)
    assert frechet_distance(a, b) == pytest.approx(expected - 2 * np.trace(np.real(sqrtm(first @ second))))

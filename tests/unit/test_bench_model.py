"""The model's benchmark: FLOPs against counts by hand, utilisation, models of equal weights, and a whole small run."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from flam_core.config import Config, ModelConfig, StageConfig, TokenizerConfig
from flam_core.config_json import to_dict
from flam_core.errors import EnvironmentFault, SettingsError
from flam_core.flops import (
    CountedForward,
    Peak,
    count_flops,
    datasheet_peak,
    matmul_peak,
    training_flops,
    utilisation,
)
from flam_core.model.attention import Attention
from flam_core.model.flam import make_dynamics
from flam_core.recipes import get_recipe
from services.bench.model import ModelBenchSettings, StepProcess, bench_model, rows
from services.bench.model_jobs import COMPARED_FRAMES, StepJob, comparison_jobs, monolithic_of, stage_jobs, with_clips
from services.bench.model_worker import Stepper, count

CPU = torch.device("cpu")
CONFIG = Config(
    recipe="test",
    tokenizer=TokenizerConfig(frame_size=8, channels=(4,), feature_dim=6, fsq_levels=(4, 4, 4)),
    model=ModelConfig(factors=2, width=16, heads=2, blocks=1, iterations=2, temporal_window=3, latent_width=8),
    tokenizer_stage=StageConfig(steps=3, batch_clips=2, clip_frames=2),
    flam_stage=StageConfig(steps=3, batch_clips=2, clip_frames=4),
    precision="fp32",
)


def test_flops_of_layers_are_those_counted_by_hand() -> None:
    assert count_flops(nn.Linear(3, 5), torch.zeros(7, 3))[1] == 2 * 7 * 3 * 5
    assert count_flops(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 10, 10))[1] == 2 * 2 * 100 * 3 * 8 * 9


def test_flops_of_attention_are_counted_although_its_kernel_is_fused() -> None:
    width, queries, keys = 16, 5, 9
    attention = Attention(width, heads=4)
    result, flops = count_flops(attention, torch.randn(2, queries, width), torch.randn(2, keys, width))
    projections = queries * width * width + keys * width * 2 * width + queries * width * width
    assert flops == 2 * 2 * (projections + 2 * queries * keys * width)
    assert result.shape == (2, queries, width)


def test_counted_forward_passes_on_and_adds_up() -> None:
    inner = nn.Linear(4, 4)
    counted, x = CountedForward(inner), torch.randn(3, 4)
    assert torch.equal(counted(x), inner(x))
    counted(x)
    assert counted.flops == 2 * (2 * 3 * 4 * 4)


def test_utilisation_is_the_share_of_the_peak() -> None:
    assert training_flops(10, frozen=4) == 34  # forward and backward of one part, forward of the other
    assert utilisation(3e12, seconds=2.0, peak=Peak(6e12, "")) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12, 51e12),
        ("NVIDIA H200", 989.4e12, 494.7e12, 66.9e12),
        ("NVIDIA H200 NVL", 835.5e12, 417.5e12, 60e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12, 19.5e12),
        ("NVIDIA A10", 125e12, 62.5e12, 31.2e12),
        ("NVIDIA L4", 121e12, 60e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 183e12, 91.6e12),
    ],
)
def test_peaks_of_known_gpus(name: str, bf16: float, tf32: float, fp32: float) -> None:
    found = [
        datasheet_peak(name, "bf16", tf32=True),
        datasheet_peak(name, "fp32", tf32=True),
        datasheet_peak(name, "fp32", tf32=False),
    ]
    assert [peak.flops for peak in found if peak] == pytest.approx([bf16, tf32, fp32])


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce GTX 1080", "Intel(R) Xeon(R)"])
def test_no_peak_is_made_up(name: str) -> None:
    assert datasheet_peak(name, "bf16", tf32=True) is None


def test_measured_peak_is_a_rate_of_this_century() -> None:
    assert 1e8 < matmul_peak(CPU, "fp32", size=256, seconds=0.05) < 1e15


@pytest.mark.parametrize("recipe", ["smoke", "tiny", "multigrid"])
def test_monolithic_model_has_equal_weights(recipe: str) -> None:
    config = get_recipe(recipe)
    monolithic = monolithic_of(config)
    built = [make_dynamics(one.model, one.tokenizer) for one in (config, monolithic)]
    weights = [
        sum(weight.numel() for name, weight in part.named_parameters() if not name.startswith("prior."))
        for part in built
    ]
    assert weights[1] == pytest.approx(weights[0], rel=0.05)
    assert (monolithic.model.state, monolithic.model.factors) == ("patches", 1)
    assert monolithic.model.latent_width == config.model.latent_width
    assert monolithic.tokenizer == config.tokenizer
    assert monolithic.flam_stage == config.flam_stage


def test_weights_of_the_large_recipe_suit_fused_kernels() -> None:
    model = monolithic_of(get_recipe("multigrid")).model
    assert (model.width // model.heads) % 8 == 0


def test_no_model_of_equal_weights_is_an_error_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"the nearest, .* is .*% off"):
        monolithic_of(get_recipe("smoke"), tolerance=1e-7)


def test_forms_of_a_step() -> None:
    tokenizer = stage_jobs(CONFIG, 0, ("fp32", "bf16"), "bf16", compiled=True)
    assert list(tokenizer) == ["fp32", "bf16", "compile"]
    flam = stage_jobs(CONFIG, 1, ("fp32", "bf16"), "bf16", compiled=False)
    assert list(flam) == ["fp32", "bf16", "plain_attention"]
    assert [job.config.precision for job in flam.values()] == ["fp32", "bf16", "bf16"]
    assert [job.plain_attention for job in flam.values()] == [False, False, True]


def test_comparison_is_on_ten_frames_and_only_the_same_losses_differ() -> None:
    config = get_recipe("tiny")
    jobs = comparison_jobs(config, "fp32", compiled=True)
    assert {job.frames for job in jobs.values()} == {COMPARED_FRAMES}
    assert {job.clips for job in jobs.values()} == {config.flam_stage.batch_clips}
    assert jobs["flam"].config.loss == config.loss
    assert jobs["flam_same_losses"].config.loss == jobs["monolithic"].config.loss
    assert replace(jobs["flam_compile"], compile=False) == jobs["flam"]


def test_clips_override_both_stages() -> None:
    changed = with_clips(CONFIG, 7)
    assert (StepJob(changed, 0).clips, StepJob(changed, 1).clips) == (7, 7)
    assert with_clips(CONFIG, None) == CONFIG


def _convolution(inputs: int, outputs: int, side: int, kernel: int) -> int:
    return 2 * inputs * outputs * side**2 * kernel**2


def test_flops_of_a_step_are_those_counted_by_hand() -> None:
    """A tokenizer of one stage on 8 px: convolutions at 8 px, then at 4 px."""
    width, features, codes = 4, 6, 3
    encoder = _convolution(3, width, 8, 3) + 4 * _convolution(width, width, 4, 3) + _convolution(width, features, 4, 1)
    decoder = (
        _convolution(codes, width, 4, 3)
        + 2 * _convolution(width, width, 4, 3)
        + _convolution(width, width, 4, 4)  # transposed: each of its inputs meets the whole kernel
        + 2 * _convolution(width, width, 8, 3)
        + _convolution(width, 3, 8, 3)
    )
    whole = encoder + _convolution(features, codes, 4, 1) + decoder
    first = count(StepJob(CONFIG, 0), CPU)
    assert first["trained_flops"] == 2 * 2 * whole
    assert first["frozen_flops"] == 0

    second = count(StepJob(CONFIG, 1), CPU)
    standardising = 2 * 16 * features * features
    assert second["frozen_flops"] == 2 * 4 * (encoder + standardising)
    assert second["trained_flops"] > 0
    assert second["tokenizer_weights"] == first["tokenizer_weights"]


def test_flops_grow_with_the_clips_but_for_the_position_codes() -> None:
    few, many = (count(StepJob(with_clips(CONFIG, clips), 1), CPU) for clips in (2, 4))
    assert many["frozen_flops"] == 2 * few["frozen_flops"]
    assert 1.9 * few["trained_flops"] < many["trained_flops"] <= 2 * few["trained_flops"]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("plain_attention", [False, True])
def test_a_step_trains_its_stage_alone(stage: int, plain_attention: bool) -> None:
    stepper = Stepper(StepJob(CONFIG, stage, plain_attention=plain_attention), CPU)
    parts = (stepper.trainer.model.tokenizer, stepper.trainer.model.dynamics)
    before = [[weight.detach().clone() for weight in part.parameters()] for part in parts]
    assert stepper.prepare()["first_step_seconds"] > 0
    ran = stepper.run(0.0)
    changed = [
        any(not torch.equal(a, b) for a, b in zip(old, part.parameters(), strict=True))
        for old, part in zip(before, parts, strict=True)
    ]
    assert changed == [stage == 0, stage == 1]
    assert 0 < ran["seconds_per_step"] < 60
    assert (ran["frozen_seconds"] > 0) == (stage == 1)
    assert 50e6 < ran["peak_memory_bytes"] < 20e9


def test_a_process_passes_its_errors_on() -> None:
    process = StepProcess("cpu")
    try:
        with pytest.raises(SettingsError, match="unknown fields colour"):
            process.ask("prepare", job=to_dict(StepJob(CONFIG, 0)) | {"colour": "red"})
        assert process.ask("describe")["threads"] >= 1  # it goes on
    finally:
        process.close()


def test_a_process_that_ends_is_named() -> None:
    process = StepProcess("no-such-device")
    try:
        with pytest.raises(EnvironmentFault, match="ended with 1 at 'describe'"):
            process.ask("describe")
    finally:
        process.close()


@pytest.mark.parametrize(
    "changes",
    [{"seconds": 0.0}, {"rounds": 0}, {"clips": 0}, {"precisions": ()}, {"recipes": ()}, {"recipes": ("tin",)}],
)
def test_settings_that_cannot_work(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        bench_model(replace(ModelBenchSettings(device="cpu"), **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(EnvironmentFault, match="no GPU"):
        bench_model(ModelBenchSettings(device="cuda"))


def test_the_whole_on_the_smallest_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other crawl where tests share the cores
    settings = ModelBenchSettings(
        recipes=("smoke",), device="cpu", clips=1, precisions=("fp32",), compile=False, seconds=0.05, rounds=2
    )
    said: list[str] = []
    result = json.loads(json.dumps(bench_model(settings, said.append)))
    assert sum(line.startswith("round 2") for line in said) == 5  # tokenizer, flam twice, and the two compared

    recipe, device = result["recipes"]["smoke"], result["device"]
    assert list(recipe) == ["weights", "tokenizer", "flam", "ten_frames"]
    assert {part: list(recipe[part]["forms"]) for part in ("tokenizer", "flam", "ten_frames")} == {
        "tokenizer": ["fp32"],
        "flam": ["fp32", "plain_attention"],
        "ten_frames": ["flam", "flam_same_losses", "monolithic"],
    }
    for part in ("tokenizer", "flam"):
        assert recipe[part]["bf16_over_fp32"] is None
        assert recipe[part]["compile_over_eager"] is None
    assert recipe["tokenizer"]["fused_over_plain_attention"] is None
    assert recipe["flam"]["fused_over_plain_attention"] > 0

    step = recipe["flam"]["forms"]["fp32"]
    stage = get_recipe("smoke").flam_stage
    assert (step["clips"], step["frames"], step["precision"]) == (1, stage.clip_frames, "fp32")
    assert step["frames_per_second"] == pytest.approx(stage.clip_frames * step["steps_per_second"])
    assert step["flops_per_step"] == 3 * step["forward_flops"] + step["frozen_forward_flops"]
    assert step["mfu"] == pytest.approx(
        step["flops_per_step"] * step["steps_per_second"] / device["peak_flops"]["fp32"]
    )
    assert 0 < step["mfu"] < 1
    assert step["steps_per_second"] == pytest.approx(1 / statistics.median(1 / one for one in step["rounds"]))
    assert step["peak_memory_bytes"] > device["memory_before_bytes"]

    compared = recipe["ten_frames"]
    slow, fast = (compared["forms"][name]["rounds"] for name in ("flam", "monolithic"))
    ratios = [there / here for here, there in zip(slow, fast, strict=True)]
    assert compared["flam_over_monolithic"] == pytest.approx(statistics.median(ratios))
    assert compared["flam_over_monolithic_compiled"] is None
    assert compared["weights"]["monolithic"] == pytest.approx(compared["weights"]["flam"], rel=0.05)
    flops = [compared["forms"][name]["forward_flops"] for name in ("flam", "monolithic")]
    assert compared["flam_over_monolithic_flops"] == pytest.approx(flops[0] / flops[1])
    assert device["threads"] == 1
    assert device["peak_source"] == {"fp32": "the fastest of large matrix products in this run"}

    lines = rows(result)
    assert lines["smoke flam compile_over_eager"] == "not measured"
    assert "steps/s" in lines["smoke ten_frames monolithic"]

"""Collapse is found by name: on recorded and made-up histories, and on small models that really train."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from flam_core.config import Config, LossConfig
from flam_core.learning.collapse import CollapseWatch, Finding, FindingName
from flam_core.learning.losses import beta_at
from flam_core.recipes import multigrid, smoke, tiny
from flam_core.variants import no_motion

Line = tuple[int, dict[str, float]]

# Recorded runs on the grid world with three agents (docs/devlog.md): explained, KL of each slot in nats.
# Recipe tiny, seed 0, a line each 50 of 1,600 steps. It leaves the plateau, and two slots carry most of the KL.
HEALTHY = [
    (0.12, [38, 42, 39, 39, 44]), (0.25, [41, 41, 41, 41, 43]), (0.30, [38, 41, 39, 38, 42]),
    (0.30, [41, 43, 40, 43, 45]), (0.34, [45, 44, 45, 47, 46]), (0.32, [48, 45, 46, 48, 48]),
    (0.36, [47, 44, 48, 50, 49]), (0.44, [51, 43, 48, 52, 48]), (0.41, [49, 44, 48, 52, 49]),
    (0.43, [51, 47, 47, 53, 49]), (0.48, [52, 45, 49, 54, 50]), (0.51, [51, 50, 47, 54, 49]),
    (0.57, [53, 51, 46, 54, 50]), (0.59, [51, 52, 45, 53, 51]), (0.63, [52, 53, 44, 54, 50]),
    (0.66, [51, 52, 44, 54, 50]), (0.66, [46, 52, 40, 51, 44]), (0.70, [31, 47, 28, 50, 31]),
    (0.70, [16, 38, 17, 44, 16]), (0.70, [5.7, 30, 6.8, 35, 6.0]), (0.73, [3.0, 27, 3.7, 27, 2.8]),
    (0.69, [1.7, 19, 2.0, 23, 1.5]), (0.72, [1.1, 21, 1.5, 24, 0.96]), (0.72, [0.76, 18, 1.1, 23, 0.74]),
    (0.72, [0.53, 18, 0.89, 24, 0.49]), (0.71, [0.42, 17, 0.67, 22, 0.39]), (0.73, [0.31, 16, 0.58, 20, 0.33]),
    (0.72, [0.29, 16, 0.52, 20, 0.29]), (0.72, [0.28, 14, 0.52, 18, 0.27]), (0.73, [0.28, 16, 0.47, 19, 0.26]),
    (0.74, [0.25, 16, 0.48, 18, 0.25]), (0.75, [0.27, 16, 0.46, 19, 0.27]),
]  # fmt: skip
# A line each 100 of 1,500 steps: the plateau, and all KL gone as soon as beta counts, from step 900 on.
COLLAPSED = [
    (0.24, [40, 40, 40, 40]), (0.29, [41, 40, 40, 40]), (0.29, [39, 38, 39, 39]), (0.29, [38, 38, 38, 38]),
    (0.24, [39, 38, 39, 38]), (0.29, [39, 38, 39, 38]), (0.35, [39, 39, 39, 39]), (0.35, [39, 38, 39, 38]),
    (0.30, [39, 38, 39, 38]), (0.36, [0.019, 0.02, 0.021, 0.053]), (0.34, [0.009, 0.009, 0.013, 0.013]),
    (0.36, [0.005, 0.006, 0.007, 0.018]), (0.35, [0.005, 0.005, 0.006, 0.016]), (0.37, [0.005, 0.005, 0.006, 0.013]),
    (0.40, [0.005, 0.005, 0.006, 0.011]),
]  # fmt: skip
# A line each 100 of 2,500 steps: it leaves the plateau late (step 700), and one slot comes to move all agents.
ONE_SLOT = [
    (0.27, [40, 41, 35, 35]), (0.29, [40, 40, 35, 36]), (0.31, [39, 39, 35, 35]), (0.29, [38, 39, 34, 36]),
    (0.24, [39, 40, 34, 36]), (0.31, [39, 40, 34, 37]), (0.50, [40, 41, 36, 51]), (0.63, [35, 35, 31, 56]),
    (0.73, [35, 35, 30, 56]), (0.71, [33, 35, 29, 60]), (0.75, [31, 32, 26, 62]), (0.82, [19, 20, 14, 60]),
    (0.80, [3.7, 7.3, 2.9, 51]), (0.82, [1.3, 1.6, 0.95, 36]), (0.86, [0.49, 0.53, 0.9, 31]),
    (0.84, [0.19, 0.19, 0.61, 23]), (0.84, [0.13, 0.12, 0.31, 19]), (0.85, [0.077, 0.091, 0.2, 15]),
    (0.86, [0.06, 0.087, 0.099, 16]), (0.85, [0.073, 0.068, 0.09, 13]), (0.86, [0.074, 0.079, 0.095, 12]),
    (0.83, [0.051, 0.09, 0.089, 12]), (0.86, [0.041, 0.1, 0.077, 14]), (0.80, [0.044, 0.095, 0.074, 11]),
    (0.82, [0.044, 0.095, 0.075, 12]),
]  # fmt: skip
# PSNR of the tokenizer, a line each 50 of 800 steps: recipe tiny, seed 1, the slowest start of a run that ended well.
TOKENIZER = [17.4, 17.4, 17.5, 21.5, 22.2, 26.6, 29.6, 36, 38.2, 39.4, 40.3, 41, 41.2, 41.4, 41, 41.7]


def config(steps: int = 1500, warmup: tuple[float, float] = (0.6, 1.0), **model: Any) -> Config:
    start = no_motion(tiny())
    model = {"factors": 4, "latent_width": 64} | model
    return replace(
        start,
        model=replace(start.model, **model),
        flam_stage=replace(start.flam_stage, steps=steps),
        loss=LossConfig(beta=2e-4, beta_warmup=warmup),
    )


def line(settings: Config, step: int, explained: float, nats: list[float], **changes: float) -> Line:
    """A log line of stage 2 in which nothing but what is given is out of the ordinary."""
    metrics = {
        "flam/loss": 1.0,
        "flam/one_step": 0.7 * (1 - explained),
        "flam/explained": explained,
        "flam/kl": sum(nats),
        "flam/beta": beta_at(settings.loss, (step - 1) / settings.flam_stage.steps),
        "flam/active_units": 0.5,
        "flam/largest_mask_share": 0.4,
        "flam/codebook_perplexity": 6.0,
        "flam/codes_used": 12.0,
    }
    metrics |= {f"flam/kl_slot_{i}": float(value) for i, value in enumerate(nats)}
    metrics |= {f"flam/codebook_perplexity_slot_{i}": math.exp(value) for i, value in enumerate(nats)}
    return step, metrics | {f"flam/{name}": value for name, value in changes.items()}


def history(settings: Config, rows: list[tuple[float, list[float]]]) -> list[Line]:
    every = settings.flam_stage.steps // len(rows)
    return [line(settings, every * (n + 1), *row) for n, row in enumerate(rows)]


def steady(settings: Config, explained: float, nats: list[float], lines: int = 30, **changes: float) -> list[Line]:
    """A run that learns as a healthy one does until a third of the stage, and then stays as it is told to."""
    every = settings.flam_stage.steps // lines
    start = [0.9 * n / lines for n in range(lines // 3)]
    return [
        line(settings, every * (n + 1), *((start[n], [40.0] * 4) if n < len(start) else (explained, nats)), **changes)
        for n in range(lines)
    ]


def tokenizer_line(step: int, psnr: float, codes: float = 15.0) -> Line:
    metrics = {"loss": 10 ** (-psnr / 10), "psnr": psnr, "flat_psnr": 17.4, "codes_used": codes}
    return step, {f"tokenizer/{name}": value for name, value in metrics.items()}


def watched(settings: Config, lines: list[Line]) -> list[tuple[int, Finding]]:
    watch = CollapseWatch(settings)
    return [(step, finding) for step, metrics in lines for finding in watch.observe(step, metrics)]


def names(found: list[tuple[int, Finding]]) -> list[str]:
    return [str(finding.name) for _, finding in found]


# Recorded runs


def test_a_run_that_learns_is_left_in_peace() -> None:
    settings = config(1600, (0.5, 0.9), factors=5, latent_width=80)
    tokenizer = [tokenizer_line(50 * (n + 1), psnr) for n, psnr in enumerate(TOKENIZER)]
    assert watched(settings, tokenizer + history(settings, HEALTHY)) == []


def test_the_plateau_and_then_the_collapse_of_the_posterior_are_named_once_each() -> None:
    settings = config()
    found = watched(settings, history(settings, COLLAPSED))
    assert names(found) == ["plateau", "posterior-collapse"]
    (at_plateau, plateau), (at_collapse, collapse) = found
    assert 0.35 * 1500 <= at_plateau <= 0.5 * 1500
    assert 1050 <= at_collapse <= 1200  # the KL fell between steps 900 and 1,000, while beta still rose
    assert "0.053 nats" in collapse.said
    assert "--loss.beta" in collapse.fix
    assert "flam/explained is 0.2" in plateau.said


def test_one_slot_that_moves_all_agents_is_named() -> None:
    settings = config(2500, (0.4, 0.8))
    found = watched(settings, history(settings, ONE_SLOT))
    assert names(found) == ["one-slot-takes-all"]
    assert 1400 <= found[0][0] <= 1600
    assert "slot 3 of 4 carries 9" in found[0][1].said


def test_a_tokenizer_that_stays_at_one_colour_is_dead() -> None:
    lines = [tokenizer_line(50 * (n + 1), 17.6) for n in range(16)]
    found = watched(config(), lines)
    assert names(found) == ["tokenizer-dead"]
    assert found[0][0] == 250  # the first line past .35 of the stage
    assert "17.6 dB" in found[0][1].said
    assert "--tokenizer_stage.learning_rate 0.002" in found[0][1].fix


# One symptom at a time


def test_a_tokenizer_with_one_code_for_all_patches_is_dead_whatever_its_psnr() -> None:
    lines = [tokenizer_line(50 * (n + 1), psnr, codes=1) for n, psnr in enumerate(TOKENIZER)]
    found = watched(config(), lines)
    assert names(found) == ["tokenizer-dead"]
    assert "all patches get one code" in found[0][1].said


def test_actions_that_never_vary_are_idle_although_their_kl_is_high() -> None:
    settings = config()
    assert names(watched(settings, steady(settings, 0.7, [38.0] * 4, active_units=0.0))) == ["idle-actions"]
    assert watched(settings, steady(settings, 0.7, [38.0] * 4, active_units=1 / 64)) == []


@pytest.mark.parametrize(
    ("perplexity", "used", "found"), [(1.2, 12, True), (4, 1, True), (1.6, 2, False), (6, 12, False)]
)
def test_a_codebook_of_which_hardly_a_code_is_used(perplexity: float, used: float, found: bool) -> None:
    settings = config(latent="vq")
    lines = steady(settings, 0.7, [0.4] * 4, codebook_perplexity=perplexity, codes_used=used)
    assert names(watched(settings, lines)) == ["codebook-collapse"] * found


def test_codes_that_only_tell_slots_apart_are_idle() -> None:
    # Recorded with 5 slots and 16 codes: four codes, a perplexity of 3.79, and every slot with one code for good.
    settings = config(latent="vq")
    lines = steady(settings, 0.3, [0.0] * 4, codebook_perplexity=3.79, codes_used=4)
    found = watched(settings, lines)
    assert names(found) == ["idle-actions", "plateau"]
    assert "4 of 16 codes" in found[0][1].said


@pytest.mark.parametrize(("workers", "found"), [(1, True), (8, False)])
def test_a_batch_too_small_to_use_the_codebook_is_no_collapse(workers: int, found: bool) -> None:
    settings = config(latent="vq", codebook=1024)  # 16 clips of 4 transitions of 4 slots: 256 codes at the most
    watch = CollapseWatch(settings, workers)
    seen = [f for at, metrics in steady(settings, 0.7, [1.0] * 4, codes_used=20) for f in watch.observe(at, metrics)]
    assert bool(seen) is found


def test_one_slot_with_all_codes_is_found_by_their_entropy() -> None:
    settings = config(latent="vq")
    assert names(watched(settings, steady(settings, 0.8, [0.01, 1.6, 0.02, 0.0]))) == ["one-slot-takes-all"]


def test_a_slot_may_hold_a_large_background_but_not_everything() -> None:
    settings = config()
    assert watched(settings, steady(settings, 0.8, [10.0] * 4, largest_mask_share=0.95)) == []
    lost = watched(settings, steady(settings, 0.3, [10.0] * 4, largest_mask_share=0.95))
    assert names(lost) == ["one-slot-takes-all", "plateau"]
    assert "95% of all patches" in lost[0][1].said


def test_one_action_of_a_monolithic_model_may_carry_everything() -> None:
    settings = config(factors=1, state="patches")
    assert watched(settings, history(settings, [(0.8, [20.0])] * 30)) == []


def test_a_loss_of_three_times_its_minimum_diverges() -> None:
    settings = config(warmup=(0.0, 0.0))
    good = steady(settings, 0.8, [20.0] * 4)[:20]
    bad = [line(settings, 1000 + 50 * n, 0.8, [20.0] * 4, one_step=0.2 + 0.2 * n) for n in range(1, 10)]
    found = watched(settings, good + bad)
    assert names(found) == ["diverging"]
    assert "--flam_stage.learning_rate 0.0005" in found[0][1].fix
    spike = [line(settings, 1050, 0.8, [20.0] * 4, one_step=5.0)]
    assert watched(settings, good + spike + [(at, good[-1][1]) for at in (1100, 1150)]) == []


def test_three_times_next_to_nothing_is_no_divergence() -> None:
    settings = config()
    assert watched(settings, history(settings, [(0.99, [20.0] * 4)] * 15 + [(0.96, [20.0] * 4)] * 15)) == []
    lines = [tokenizer_line(50 * (n + 1), psnr) for n, psnr in enumerate([*TOKENIZER[:10], *[34.0] * 6])]
    assert watched(settings, lines) == []
    back = [tokenizer_line(50 * (n + 1), psnr) for n, psnr in enumerate([*TOKENIZER[:10], *[21.0] * 6])]
    assert names(watched(settings, back)) == ["diverging"]


def test_a_loss_that_rises_with_beta_does_not_diverge() -> None:
    settings = config(warmup=(0.5, 0.9))
    settings = replace(settings, loss=replace(settings.loss, beta=0.1))
    lines = steady(settings, 0.8, [20.0] * 4)
    losses = [metrics["flam/one_step"] + metrics["flam/beta"] * metrics["flam/kl"] for _, metrics in lines]
    assert losses[-1] > 10 * min(losses)
    assert watched(settings, lines) == []


@pytest.mark.parametrize(("explained", "found"), [(0.3, []), (0.02, ["plateau"])])
def test_without_latent_actions_only_copying_is_a_plateau(explained: float, found: list[str]) -> None:
    settings = config(latent="none")
    lines = [
        (at, {key: value for key, value in metrics.items() if "kl" not in key and "active" not in key})
        for at, metrics in steady(settings, explained, [])
    ]
    seen = watched(settings, lines)
    assert names(seen) == found
    assert all("no better than copying" in finding.said for _, finding in seen)


# When it is said


def test_it_is_said_once_and_again_when_it_comes_back() -> None:
    settings = config()
    idle = {"active_units": 0.0}
    lines = [line(settings, 50 * (n + 1), 0.6, [38.0] * 4, **(idle if n < 12 or n > 26 else {})) for n in range(30)]
    assert [(at, str(f.name)) for at, f in watched(settings, lines)] == [(550, "idle-actions"), (1450, "idle-actions")]
    blip = [line(settings, 50 * (n + 1), 0.6, [38.0] * 4, **({} if n in (15, 16) else idle)) for n in range(30)]
    assert names(watched(settings, blip)) == ["idle-actions"]


@given(
    st.lists(st.floats(-0.5, 0.6), min_size=10, max_size=10),
    st.lists(st.floats(0, 60), min_size=40, max_size=40),
    st.lists(st.floats(0, 1), min_size=30, max_size=30),
)
def test_nothing_is_said_of_the_first_third_of_a_stage(
    explained: list[float], nats: list[float], shares: list[float]
) -> None:
    settings = config()
    lines = [
        line(settings, 50 * (n + 1), explained[n], nats[4 * n : 4 * n + 4], one_step=0.5 + 0.5 * shares[n],
             active_units=shares[10 + n], largest_mask_share=shares[20 + n])
        for n in range(10)
    ]  # fmt: skip
    assert watched(settings, lines) == []


def test_a_stage_of_one_or_two_lines_says_nothing() -> None:
    settings = smoke()
    assert watched(settings, [tokenizer_line(20, 5.0, codes=1), line(settings, 30, 0.0, [0.0, 0.0])]) == []


@pytest.mark.parametrize("every", [10, 50, 100])
def test_the_plateau_is_found_however_often_a_line_is_logged(every: int) -> None:
    settings = config(1600)
    noise = np.random.default_rng(0).normal(0, 0.03, 1600 // every)
    lines = [line(settings, every * (n + 1), 0.3 + float(x), [38.0] * 4) for n, x in enumerate(noise)]
    found = watched(settings, lines)
    assert names(found) == ["plateau"]
    assert found[0][0] <= 900


def test_a_missing_meter_is_an_error_and_not_a_silent_pass() -> None:
    settings = config()
    at, metrics = line(settings, 50, 0.3, [40.0] * 4)
    del metrics["flam/active_units"]
    with pytest.raises(KeyError, match="flam/active_units"):
        CollapseWatch(settings).observe(at, metrics)


# Resuming


@pytest.mark.parametrize("rows", [COLLAPSED, ONE_SLOT])
def test_a_resumed_run_says_what_the_unbroken_one_would(rows: list[tuple[float, list[float]]]) -> None:
    settings = config(100 * len(rows), (0.5, 0.9))
    tokenizer = [tokenizer_line(50 * (n + 1), 17.6) for n in range(16)]
    lines = tokenizer + history(settings, rows)
    whole = watched(settings, lines)
    assert len(whole) >= 2
    for cut in range(len(lines) + 1):
        first = CollapseWatch(settings)
        before = [(at, f) for at, metrics in lines[:cut] for f in first.observe(at, metrics)]
        state = json.loads(json.dumps(first.state(), allow_nan=False))
        second = CollapseWatch(settings)
        second.restore(state)
        assert second.state() == first.state()
        assert before + [(at, f) for at, metrics in lines[cut:] for f in second.observe(at, metrics)] == whole


def test_the_state_stays_small_however_long_the_run() -> None:
    settings = config(100_000)
    watch = CollapseWatch(settings)
    for step in range(50, 100_001, 50):
        watch.observe(*line(settings, step, 0.3 + step / 1e6, [5.0] * 4))
    assert len(json.dumps(watch.state())) < 8_000


# What to change


@pytest.mark.parametrize("recipe", [tiny, multigrid])
@pytest.mark.parametrize("model", [{}, {"latent": "vq"}, {"state": "patches", "factors": 1}, {"state": "patches"}])
def test_what_is_advised_is_a_setting_that_is_not_taken_yet(recipe: Any, model: dict[str, Any]) -> None:
    start = no_motion(recipe())
    settings = replace(
        start, model=replace(start.model, **model), loss=replace(start.loss, bridge=0.0, slot_prediction=0.0)
    )
    watch = CollapseWatch(settings)
    findings = [watch._finding(name, "it was seen") for name in FindingName]
    assert all(str(finding) == f"{finding.name}: it was seen. {finding.fix}" for finding in findings)
    ways = {way for finding in findings for way in finding.fix.split("; or ")}
    for way in ways:
        flags = re.findall(r"--[\w.]+|(?<= )[-\de.]*\d|motion|dual", way)
        changed = tyro.cli(Config, args=flags, default=settings, use_underscores=True)
        assert changed != settings, way

"""Sweeps whose outcome is known: K = 4 is what the data want, beta 1e-2 collapses."""

from __future__ import annotations

from typing import Any

import numpy as np

OBJECTIVES = [
    {"metric": "rollout/psnr@10", "direction": "maximize", "title": "PSNR at step 10, dB", "worst": 0.0},
    {"metric": "dci/i", "direction": "maximize", "title": "DCI informativeness", "worst": 0.0},
    {"metric": "leakage", "direction": "minimize", "title": "leakage", "worst": 1.0},
    {"metric": "actions/bits", "direction": "minimize", "title": "bits per step", "worst": 1e6},
    {"metric": "speed/frames_per_second", "direction": "maximize", "title": "frames/s", "worst": 0.0},
]
_QUALITY = {2: 26.0, 4: 40.0, 8: 40.1}
_STEPS = 1000


def trial(factors: int, codebook: int, beta: float, seed: int, **changes: Any) -> dict[str, Any]:
    """One that came to its end, if `changes` do not say otherwise."""
    noise = np.random.default_rng((factors, codebook, seed)).normal(scale=0.3)
    psnr = _QUALITY[factors] - (2.0 if codebook else 0.0) + noise
    metrics = {
        "rollout/psnr@10": psnr,
        "dci/i": 0.5 if factors == 2 else 0.98,
        "leakage": 0.3 if factors == 2 else 0.01,
        "actions/bits": float(np.log2(codebook) * factors) if codebook else 12.0 * factors,
        "speed/frames_per_second": 1200 / factors,
        "actions/usage": 0.9,
        "slots/used": min(factors, 4),
    }
    looks = [
        {"step": step, "metrics": metrics | {"rollout/psnr@10": 17 + (psnr - 17) * step / _STEPS}}
        for step in range(250, _STEPS + 1, 250)
    ]
    return {
        "name": f"k{factors}-{codebook}-{beta}-seed{seed}",
        "run": f"tiny-{factors}{codebook}{seed}",
        "factors": factors,
        "codebook": codebook,
        "latent_width": 16 * factors,
        "beta": beta,
        "fsq": "8x8x8",
        "seed": seed,
        "metrics": metrics,
        "seconds": 300.0 + 20 * factors,
        "steps": _STEPS,
        "stopped_by": None,
        "looks": looks,
        **changes,
    }


def collapsed(factors: int, seed: int, beta: float = 1e-2) -> dict[str, Any]:
    """One that was lost on the way."""
    whole = trial(factors, 0, beta, seed)
    looks = [{"step": s, "metrics": {"rollout/psnr@10": 18.0, "actions/bits": 0.01}} for s in (250, 500)]
    metrics = {"rollout/psnr@10": 18.0, "actions/bits": 0.01}
    return {
        **whole,
        "looks": looks,
        "metrics": metrics,
        "steps": 500,
        "stopped_by": "posterior-collapse",
        "seconds": 180.0,
    }


def halved(factors: int, codebook: int, seed: int) -> dict[str, Any]:
    """One that was stopped since others were better."""
    whole = trial(factors, codebook, 2e-4, seed)
    looks = whole["looks"][:2]
    return {**whole, "looks": looks, "metrics": looks[-1]["metrics"], "steps": 500, "stopped_by": "asha"}


def sweep(**changes: Any) -> dict[str, Any]:
    """Three numbers of factors, Gaussian and discrete, two seeds; two of them lost to a high beta, one halved."""
    trials = [trial(k, c, 2e-4, s) for k in (2, 4, 8) for c in (0, 8) for s in (0, 1)]
    trials[2] = halved(2, 8, 0)
    trials += [collapsed(4, 0), collapsed(4, 1)]
    return {
        "sweep": "sweep-tiny-0123abcd",
        "recipe": "tiny",
        "dataset": "grid",
        "objectives": OBJECTIVES,
        "steps": _STEPS,
        "trials": trials,
        **changes,
    }

"""How much arithmetic a training step is, and what share of a device's peak it reaches (MFU).

FLOPs are those of matrix products and convolutions, two for each multiply-add, as PyTorch's FlopCounterMode counts
them on the real module; what is done element by element is left out, as is usual.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ResultT = TypeVar("ResultT")
Precision = Literal["fp32", "bf16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

_TRAINING_PASSES = 3
"""A backward pass is two forward ones: by the inputs and by the weights."""


@dataclass(frozen=True)
class Peak:
    """What a device can do at best."""

    flops: float
    """A second, without sparsity."""
    source: str
    """Where the number is from, in words."""


@dataclass(frozen=True)
class _Datasheet:
    """Dense TFLOPS a second of NVIDIA's datasheets (those of the tensor cores are given there with sparsity: half)."""

    bf16: float
    tf32: float
    fp32: float


# By words of the name that CUDA gives; of several that fit, the one with more words is meant.
_DATASHEETS = {
    "A10": _Datasheet(125, 62.5, 31.2),
    "A100": _Datasheet(312, 156, 19.5),
    "A30": _Datasheet(165, 82, 10.3),
    "A40": _Datasheet(149.7, 74.8, 37.4),
    "B200": _Datasheet(2250, 1125, 75),
    "H100 HBM3": _Datasheet(989.4, 494.7, 66.9),
    "H100 NVL": _Datasheet(835.5, 417.5, 60),
    "H100 PCIe": _Datasheet(756, 378, 51),
    "H200": _Datasheet(989.4, 494.7, 66.9),
    "H200 NVL": _Datasheet(835.5, 417.5, 60),
    "L4": _Datasheet(121, 60, 30.3),
    "L40S": _Datasheet(362, 183, 91.6),
}


class CountedForward(nn.Module):
    """Passes calls on to a module and adds up the FLOPs of its forward passes in `flops`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.flops = 0

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the inner module gives."""
        result, flops = count_flops(self.inner, *arguments, **named)
        self.flops += flops
        return result


def count_flops(function: Callable[..., ResultT], *arguments: Any, **named: Any) -> tuple[ResultT, int]:
    """What the function gives, and the FLOPs that it took.

    Attention is counted in its plain form, since the counter does not know the fused one of the CPU; its two matrix
    products are the same.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = function(*arguments, **named)
    return result, counter.get_total_flops()


def training_flops(trained: float, frozen: float = 0) -> float:
    """FLOPs of a training step from those of its forward passes: the trained part also goes backward."""
    return _TRAINING_PASSES * trained + frozen


def utilisation(flops: float, seconds: float, peak: Peak) -> float:
    """Model FLOPs utilisation (MFU): the share of the peak that `flops` in `seconds` come to."""
    return flops / seconds / peak.flops


def datasheet_peak(name: str, precision: Precision, *, tf32: bool) -> Peak | None:
    """The dense peak of the GPU that CUDA calls `name`, such as "NVIDIA H100 80GB HBM3"; None if it is not known.

    tf32: fp32 may use the tensor cores, as PyTorch lets convolutions do by default. Then theirs is the peak, so that
    the share is never flattered.
    """
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:  # a slice of a device
        return None
    known = [key for key in _DATASHEETS if words.issuperset(key.split())]
    if not known:
        return None
    found = max(known, key=lambda key: len(key.split()))
    sheet = _DATASHEETS[found]
    unit = "bf16" if precision == "bf16" else "tf32" if tf32 else "fp32"
    return Peak(getattr(sheet, unit) * 1e12, f"datasheet of the {found}, {unit}, dense")


def matmul_peak(device: torch.device, precision: Precision, *, size: int, seconds: float) -> float:
    """FLOPs a second of the fastest of several products of two size x size matrices, tried for `seconds`."""
    left, right = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    _timed(left, right)  # libraries choose their kernels at the first call
    while True:
        best = min(best, _timed(left, right))
        if time.perf_counter() >= end:
            return 2 * size**3 / best


def _timed(left: Tensor, right: Tensor) -> float:
    synchronise(left.device)
    started = time.perf_counter()
    torch.matmul(left, right)
    synchronise(left.device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done all that it was told; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

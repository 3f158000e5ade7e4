"""A process that does one training step over and over: then peak memory is that of this step and of nothing else.

    python -m services.bench.model_worker cpu

It reads commands as lines of JSON and answers each by one line. services/bench/model.py starts it.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention import SDPBackend, sdpa_kernel

from flam_core.config import Config
from flam_core.config_json import from_dict
from flam_core.errors import EnvironmentFault, FlamError, pack
from flam_core.flops import CountedForward, Precision, count_flops, matmul_peak, synchronise
from flam_core.learning.trainer import Trainer, Wrap
from flam_core.variants import dynamics_weights
from services.bench.model_jobs import StepJob

_WARM_STEPS = 2
_FOREVER = 1_000_000_000
"""Steps of a stage that no benchmark comes to the end of."""
_RATE = 1e-6
"""Learning rate. A step takes as long whatever it is, and noise for frames must not blow up the weights."""
_FROZEN_SHARE = 0.2
"""Of the time of a round, beside it, for the frozen encoder by itself."""
_MATRIX = {"cpu": 2048, "cuda": 8192}
"""Side of the matrices that the peak is measured with: large for the device, and a product takes milliseconds."""


class Stepper:
    """The training step that a job describes, on random frames."""

    def __init__(self, job: StepJob, device: torch.device, wrap: Wrap | None = None) -> None:
        """wrap: as of Trainer."""
        self.job, self.device = job, device
        self.trainer = Trainer(_endless(job), device, wrap=wrap, compiled=job.compile)
        self.trainer.step = job.stage  # stage 0 has no end, or one step, which is taken as done
        generator = torch.Generator().manual_seed(0)
        size = job.config.tokenizer.frame_size
        shape = (job.clips, job.frames, size, size, 3)
        self.frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)

    def step(self) -> None:
        """One."""
        with sdpa_kernel(SDPBackend.MATH) if self.job.plain_attention else nullcontext():
            self.trainer.train_step(self.frames, [f"{self.trainer.step}.{clip}" for clip in range(len(self.frames))])

    def prepare(self) -> dict[str, float]:
        """The first steps, in which all is compiled and set up; seconds of the very first."""
        started = time.perf_counter()
        self.step()
        synchronise(self.device)
        first = time.perf_counter() - started
        for _ in range(_WARM_STEPS - 1):
            self.step()
        return {"first_step_seconds": first}

    def run(self, seconds: float) -> dict[str, float]:
        """Steps for so long, at least one: seconds of a step, those of the frozen encoder by itself, and the most
        memory in bytes that was ever in use."""
        taken, steps = _repeat(self.step, seconds, self.device)
        frozen = 0.0
        if self.job.stage == 1:
            spent, times = _repeat(self._encode, seconds * _FROZEN_SHARE, self.device)
            frozen = spent / times
        peak = _peak_memory(self.device)
        _release(self.device)
        return {"seconds_per_step": taken / steps, "frozen_seconds": frozen, "peak_memory_bytes": peak}

    def _encode(self) -> None:
        """What stage 2 does with the frozen encoder."""
        dtype = self.trainer.dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            self.trainer.encode(self.frames)


def _repeat(action: Callable[[], None], seconds: float, device: torch.device) -> tuple[float, int]:
    """Do it for so long, at least once, after one time that does not count: seconds taken and times done."""
    action()  # wakes caches and the allocator after what others did
    synchronise(device)
    started, times = time.perf_counter(), 0
    while True:
        action()
        synchronise(device)
        times += 1
        taken = time.perf_counter() - started
        if taken >= seconds:
            return taken, times


def count(job: StepJob, device: torch.device) -> dict[str, int]:
    """FLOPs forward of a step, of the trained module and of what is frozen; weights of both stages' modules."""
    counted: list[CountedForward] = []

    def wrap(module: nn.Module) -> nn.Module:
        counted.append(CountedForward(module))
        return counted[-1]

    stepper = Stepper(replace(job, compile=False, plain_attention=False), device, wrap)
    stepper.step()
    model = stepper.trainer.model
    frozen = count_flops(model.encode, stepper.frames)[1] if job.stage == 1 else 0
    return {
        "trained_flops": sum(one.flops for one in counted),
        "frozen_flops": frozen,
        "tokenizer_weights": sum(weight.numel() for weight in model.tokenizer.parameters()),
        "dynamics_weights": dynamics_weights(job.config.model, job.config.tokenizer),
    }


def _release(device: torch.device) -> None:
    """Hand back a GPU's memory that is not in use, for the processes whose turn is next."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _endless(job: StepJob) -> Config:
    config = job.config
    first = replace(config.tokenizer_stage, steps=1 if job.stage else _FOREVER, learning_rate=_RATE)
    second = replace(config.flam_stage, steps=_FOREVER, learning_rate=_RATE)
    return replace(config, tokenizer_stage=first, flam_stage=second)


def _peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU at most; on a CPU the resident set of this process at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss, which starts from what the parent process had.
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        return {"name": torch.cuda.get_device_name(device), "tf32": tf32, "threads": torch.get_num_threads()}
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].split(":", 1)[1].strip() if models else platform.machine()
    return {"name": name, "tf32": False, "threads": torch.get_num_threads()}


class _Commands:
    """What the process can be told."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stepper: Stepper | None = None

    def describe(self) -> dict[str, Any]:
        return _describe(self.device) | {"memory_bytes": _peak_memory(self.device)}

    def prepare(self, job: Any) -> dict[str, float]:
        self.stepper = Stepper(from_dict(StepJob, job), self.device)
        prepared = self.stepper.prepare()
        _release(self.device)
        return prepared

    def run(self, seconds: float) -> dict[str, float]:
        assert self.stepper is not None, "prepare comes first"
        return self.stepper.run(seconds)

    def count(self, job: Any) -> dict[str, int]:
        counted = count(from_dict(StepJob, job), self.device)
        _release(self.device)
        return counted

    def matmul(self, precision: Precision, seconds: float) -> dict[str, float]:
        size = _MATRIX[self.device.type]
        flops = matmul_peak(self.device, precision, size=size, seconds=seconds)
        _release(self.device)
        return {"flops": flops, "size": size}


def _answer(commands: _Commands, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return getattr(commands, name)(**arguments)
    except FlamError as error:
        return {"error": pack(error)}
    except torch.OutOfMemoryError as error:
        return {"error": pack(EnvironmentFault(f"out of GPU memory: {_line(error)}", fix="Give fewer --clips."))}
    except TorchDynamoException as error:
        fault = EnvironmentFault(
            f"torch.compile failed: {_line(error)}",
            fix="It needs a C++ compiler and Python's headers (Debian: g++ python3-dev). Or use --no_compile.",
        )
        return {"error": pack(fault)}


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def main() -> None:
    """Answer commands until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    commands = _Commands(torch.device(sys.argv[1]))
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(_answer(commands, name, arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()

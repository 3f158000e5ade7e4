"""`jobs/bench.py model`: how fast both stages train, what share of the device that is, and what helps."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from flam_core.config import Config
from flam_core.config_json import to_dict
from flam_core.errors import EnvironmentFault, SettingsError, unpack
from flam_core.flops import Peak, Precision, datasheet_peak, training_flops, utilisation
from flam_core.learning.schedule import autocast_dtype
from flam_core.recipes import get_recipe
from services.bench.model_jobs import COMPARED_FRAMES, StepJob, comparison_jobs, stage_jobs, with_clips

_ROOT = Path(__file__).resolve().parents[2]
_MATMUL_SECONDS = 1.0
"""At most, for which the peak is measured, in each round."""
_STAGES = ("tokenizer", "flam")


@dataclass(frozen=True)
class ModelBenchSettings:
    """What is measured and how long."""

    recipes: tuple[str, ...] = ("tiny", "multigrid")
    """Of flam_core/recipes.py."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes a GPU where there is one."""
    clips: int | None = None
    """Clips of a step instead of the recipe's: `multigrid` is made for GPUs."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """Of the forward pass. All else is measured at the one that training takes by itself on this device."""
    compile: bool = True
    """Measure torch.compile too. On two cores it takes minutes to compile."""
    seconds: float = 5.0
    """For which each form is measured in a round; at least one step."""
    rounds: int = 3
    """Times that each form is measured, in turn. Ratios are medians over rounds: what a busy machine does to both sides
    of one cancels out."""


@dataclass(frozen=True)
class _Stepped:
    """One form of a step, measured."""

    first_step_seconds: float
    seconds: tuple[float, ...]
    """Of a step, in each round."""
    frozen_seconds: tuple[float, ...]
    """Of which the frozen encoder's, measured by itself."""
    peak_memory_bytes: int


class StepProcess:
    """A process of `model_worker`."""

    def __init__(self, device: str) -> None:
        command = [sys.executable, "-m", "services.bench.model_worker", device]
        self._process = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Its answer, as plain JSON.

        Raises the FlamError that it met there, or EnvironmentFault if it ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([command, arguments]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise EnvironmentFault(
                f"bench model: the process of a step ended with {code} at {command!r}",
                fix="Its last words are above. -9 mostly means out of memory: give fewer --clips.",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise unpack(answer["error"])
        return answer

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()


class _Bench:
    """What all recipes share: settings, device, its peaks, and a process that measures and counts aside."""

    def __init__(self, settings: ModelBenchSettings, aside: StepProcess, say: Callable[[str], None]) -> None:
        self.settings, self.aside, self.say = settings, aside, say
        self.device = _device(settings)
        self.base: Precision = _base_precision(settings, self.device)
        self.about = aside.ask("describe")
        self._matmul: dict[Precision, float] = {}
        self._counted: dict[StepJob, dict[str, int]] = {}

    def peak(self, precision: Precision) -> Peak:
        """From the datasheet of a GPU that is known, else as measured."""
        known = datasheet_peak(self.about["name"], precision, tf32=self.about["tf32"])
        return known or Peak(self._matmul[precision], "the fastest of large matrix products in this run")

    def look_at_peaks(self) -> None:
        """Measure what the device can do now; the best of all looks counts."""
        for precision in self.settings.precisions:
            seconds = min(_MATMUL_SECONDS, self.settings.seconds)
            found = self.aside.ask("matmul", precision=precision, seconds=seconds)["flops"]
            self._matmul[precision] = max(found, self._matmul.get(precision, 0.0))

    def count(self, job: StepJob) -> dict[str, int]:
        """FLOPs and weights of a step, which its precision and form do not change."""
        bare = StepJob(replace(job.config, precision="fp32"), job.stage)
        if bare not in self._counted:
            self._counted[bare] = self.aside.ask("count", job=to_dict(bare))
        return self._counted[bare]

    def measure(self, title: str, jobs: dict[str, StepJob]) -> dict[str, _Stepped]:
        """Each job in a process of its own, in turn, for all rounds. Jobs that are the same are measured once."""
        names: dict[StepJob, str] = {}
        for name, job in jobs.items():
            names.setdefault(job, name)
        first: dict[StepJob, float] = {}
        ran: dict[StepJob, list[dict[str, float]]] = {job: [] for job in names}
        with ExitStack() as stack:
            processes: dict[StepJob, StepProcess] = {}
            for job, name in names.items():
                processes[job] = StepProcess(self.device)
                stack.callback(processes[job].close)
                first[job] = processes[job].ask("prepare", job=to_dict(job))["first_step_seconds"]
                self.say(f"{title}: {name}: first step {first[job]:.1f} s")
            for turn in range(self.settings.rounds):
                self.look_at_peaks()
                for job, name in names.items():
                    found = processes[job].ask("run", seconds=self.settings.seconds)
                    ran[job].append(found)
                    self.say(f"round {turn + 1}: {title}: {name}: {1 / found['seconds_per_step']:.3g} steps/s")
        return {
            name: _Stepped(
                first[job],
                tuple(one["seconds_per_step"] for one in ran[job]),
                tuple(one["frozen_seconds"] for one in ran[job]),
                int(max(one["peak_memory_bytes"] for one in ran[job])),
            )
            for name, job in jobs.items()
        }

    def describe(self) -> dict[str, Any]:
        """The device as plain JSON."""
        peaks = {precision: self.peak(precision) for precision in self.settings.precisions}
        return {
            "kind": self.device,
            "name": self.about["name"],
            "threads": self.about["threads"],
            "torch": torch.__version__,
            "base_precision": self.base,
            "peak_flops": {name: peak.flops for name, peak in peaks.items()},
            "peak_source": {name: peak.source for name, peak in peaks.items()},
            "matmul_flops": dict(self._matmul),
            "peak_memory_of": "allocated on the GPU" if self.device == "cuda" else "resident set of the process",
            "memory_before_bytes": self.about["memory_bytes"],
        }


def bench_model(settings: ModelBenchSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure everything; the result is plain JSON (docs/performance.md says what each key means).

    Raises SettingsError for settings that cannot work, and EnvironmentFault without the GPU or the compiler asked for,
    or when memory runs out.
    """
    if settings.seconds <= 0 or settings.rounds < 1 or (settings.clips is not None and settings.clips < 1):
        raise SettingsError("bench model: seconds, rounds and clips must be above 0", fix="Check the settings.")
    if not settings.precisions or not settings.recipes:
        raise SettingsError("bench model: no precision or no recipe", fix="Name at least one.")
    configs = {name: with_clips(get_recipe(name), settings.clips) for name in settings.recipes}
    aside = StepProcess(_device(settings))
    try:
        bench = _Bench(settings, aside, say)
        found = {name: _recipe(bench, config) for name, config in configs.items()}
        # Only now: until the last round a higher peak may be seen, and one is meant for all.
        for recipe in found.values():
            for part in (*_STAGES, "ten_frames"):
                for form in recipe[part]["forms"].values():
                    peak = bench.peak(form["precision"])
                    form["mfu"] = utilisation(form["flops_per_step"], 1 / form["steps_per_second"], peak)
        return {"recipes": found, "device": bench.describe()}
    finally:
        aside.close()


def rows(result: dict[str, Any]) -> dict[str, str]:
    """The result as lines of a table."""
    lines = {"device": result["device"]["name"]}
    for name, recipe in result["recipes"].items():
        for part in (*_STAGES, "ten_frames"):
            for form, ran in recipe[part]["forms"].items():
                lines[f"{name} {part} {form}"] = (
                    f"{ran['steps_per_second']:.3g} steps/s, {ran['frames_per_second']:.4g} frames/s, "
                    f"MFU {ran['mfu']:.3f}, {ran['peak_memory_bytes'] / 2**20:.0f} MiB"
                )
            for key, value in recipe[part].items():
                if "_over_" in key:
                    lines[f"{name} {part} {key}"] = "not measured" if value is None else f"{value:.3g}"
    return lines


def _recipe(bench: _Bench, config: Config) -> dict[str, Any]:
    """Both stages in all their forms, and FLAM beside the monolithic model."""
    settings = bench.settings
    found: dict[str, Any] = {}
    for stage, name in enumerate(_STAGES):
        jobs = stage_jobs(config, stage, settings.precisions, bench.base, settings.compile)
        ran = bench.measure(f"{config.recipe} {name}", jobs)
        found[name] = {
            "bf16_over_fp32": _median_ratio(ran, "fp32", "bf16"),
            "compile_over_eager": _median_ratio(ran, bench.base, "compile"),
            "fused_over_plain_attention": _median_ratio(ran, "plain_attention", bench.base),
            "forms": {form: _form(bench, jobs[form], one) for form, one in ran.items()},
        }
    counted = bench.count(StepJob(config, 1))
    weights = {name: counted[f"{name}_weights"] for name in ("tokenizer", "dynamics")}
    return {"weights": weights, **found, "ten_frames": _ten_frames(bench, config)}


def _ten_frames(bench: _Bench, config: Config) -> dict[str, Any]:
    """FLAM's step over that of the monolithic model of equal weights; above 1, FLAM takes longer."""
    jobs = comparison_jobs(config, bench.base, bench.settings.compile)
    ran = bench.measure(f"{config.recipe}, {COMPARED_FRAMES} frames", jobs)
    flam, monolithic = (bench.count(jobs[name]) for name in ("flam", "monolithic"))
    model = jobs["monolithic"].config.model
    return {
        "flam_over_monolithic": _median_ratio(ran, "flam", "monolithic"),
        "flam_over_monolithic_compiled": _median_ratio(ran, "flam_compile", "monolithic_compile"),
        "flam_over_monolithic_same_losses": _median_ratio(ran, "flam_same_losses", "monolithic"),
        "flam_over_monolithic_without_encoder": _trained_seconds(ran["flam"]) / _trained_seconds(ran["monolithic"]),
        "flam_over_monolithic_flops": flam["trained_flops"] / monolithic["trained_flops"],
        "weights": {"flam": flam["dynamics_weights"], "monolithic": monolithic["dynamics_weights"]},
        "monolithic": {"blocks": model.blocks, "width": model.width, "heads": model.heads},
        "forms": {form: _form(bench, jobs[form], one) for form, one in ran.items()},
    }


def _form(bench: _Bench, job: StepJob, ran: _Stepped) -> dict[str, Any]:
    """One form of a step as plain JSON, all but its utilisation. Speeds are medians over rounds."""
    counted = bench.count(job)
    seconds = statistics.median(ran.seconds)
    return {
        "steps_per_second": 1 / seconds,
        "frames_per_second": job.clips * job.frames / seconds,
        "flops_per_step": training_flops(counted["trained_flops"], counted["frozen_flops"]),
        "forward_flops": counted["trained_flops"],
        "frozen_forward_flops": counted["frozen_flops"],
        "peak_memory_bytes": ran.peak_memory_bytes,
        "clips": job.clips,
        "frames": job.frames,
        "precision": job.config.precision,
        "first_step_seconds": ran.first_step_seconds,
        "frozen_seconds": statistics.median(ran.frozen_seconds),
        "rounds": [1 / one for one in ran.seconds],
    }


def _median_ratio(ran: dict[str, _Stepped], a: str, b: str) -> float | None:
    """Median over rounds of the seconds of one form over those of another; None where one was not measured."""
    if a not in ran or b not in ran:
        return None
    return statistics.median(x / y for x, y in zip(ran[a].seconds, ran[b].seconds, strict=True))


def _trained_seconds(ran: _Stepped) -> float:
    """Of a step, without the frozen encoder's share."""
    return statistics.median(ran.seconds) - statistics.median(ran.frozen_seconds)


def _device(settings: ModelBenchSettings) -> str:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("bench model: no GPU that this PyTorch can use", fix="Use --device cpu.")
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def _base_precision(settings: ModelBenchSettings, device: str) -> Precision:
    """What training takes by itself on this device, or the first that is measured if that is not."""
    precision: Precision = "fp32" if autocast_dtype("auto", torch.device(device)) is None else "bf16"
    return precision if precision in settings.precisions else settings.precisions[0]

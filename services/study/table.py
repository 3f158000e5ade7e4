"""A study's results: rows with mean and standard error over seeds, as JSON, CSV, Markdown and plots."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from flam_core.config import Config
from flam_core.evaluation.slots import steered
from flam_core.evaluation.stats import over_seeds
from flam_core.variants import dynamics_weights
from services.study.plan import Cell
from services.training.lineage import hardware

Result = tuple[Cell, dict[str, Any]]
_SPREAD = {
    "psnr@1": "rollout/psnr@1",
    "psnr@10": "rollout/psnr@10",
    "psnr@50": "horizon/psnr@50",
    "ssim@1": "rollout/ssim@1",
    "ssim@10": "rollout/ssim@10",
    "ceiling": "ceiling/psnr",
    "copy@1": "copy/psnr@1",
    "copy@10": "copy/psnr@10",
    "shuffled@1": "shuffled/psnr@1",
    "shuffled@10": "shuffled/psnr@10",
    "action_probe": "action_probe/visible_accuracy",
    "action_probe_gain": "action_probe/visible_gain",
    "action_probe_told": "action_probe/accuracy",
    "action_probe_state_only": "action_probe/state_only",
    "action_probe_others_gain": "action_probe/others_gain",
    "action_probe_others_gain_max": "action_probe/others_gain_max",
    "position_probe": "dci/i",
    "slots_used": "slots/used",
    "steered": "slots/steered",
}
"""Columns with mean, se, low, high and n, and the metric that each comes from."""
_BELOW = {
    "below_ceiling@1": ("ceiling/psnr@1", "rollout/psnr@1"),
    "below_ceiling@10": ("ceiling/psnr@10", "rollout/psnr@10"),
}
"""Likewise, each the difference of two metrics of the same training."""
_MARKDOWN = ("psnr@1", "psnr@10", "psnr@50", "copy@10", "ceiling", "below_ceiling@10", "action_probe")


def rows_of(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row for each model and number of agents, in the order in which they first appear.

    `psnr@1` and other columns are {mean, se, low, high, n} over seeds (all but mean and n null with one seed), or null
    where nothing was measured; `dci` is {d, c, i} and `dci_se` its standard errors, `leakage` a number and `leakage_se`
    its error. `failed` says which seeds gave no
    numbers, and why, and `findings` by seed what was wrong when a training ended, for those that recorded it.
    `weights_compared` are those that models of one world are alike in (`variants.dynamics_weights`).
    """
    groups: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    configs: dict[tuple[str, int], Config] = {}
    for cell, result in results:
        groups[cell.model, cell.agents].append(result)
        configs[cell.model, cell.agents] = cell.config
    rows = []
    for (model, agents), group in groups.items():
        config = configs[model, agents]
        good = [_with_steered(result["metrics"]) for result in group if "metrics" in result]
        row: dict[str, Any] = {"model": model, "agents": agents, "seeds": len(good)}
        row |= {name: _estimate(good, key) for name, key in _SPREAD.items()}
        row |= {name: _estimate(good, *keys) for name, keys in _BELOW.items()}
        dci = {part: _estimate(good, f"dci/{part}") for part in "dci"}
        known = all(dci.values())
        row["dci"] = {part: one["mean"] for part, one in dci.items() if one} if known else None
        row["dci_se"] = {part: one["se"] for part, one in dci.items() if one} if known else None
        leakage = _estimate(good, "leakage")
        row["leakage"] = leakage and leakage["mean"]
        row["leakage_se"] = leakage and leakage["se"]
        row["findings"] = {
            str(result["seed"]): result["findings"] for result in group if result.get("findings") is not None
        }
        row["failed"] = {str(result["seed"]): result["failed"] for result in group if "failed" in result}
        row["seconds"] = statistics.mean(result["seconds"] for result in group)
        row["weights"] = next((result["weights"] for result in group if "weights" in result), None)
        row["weights_compared"] = dynamics_weights(config.model, config.tokenizer)
        rows.append(row)
    return rows


def _with_steered(metrics: dict[str, float]) -> dict[str, float]:
    """For results from before evaluations gave it."""
    share = steered(metrics)
    return metrics if share is None else {**metrics, "slots/steered": share}


def _estimate(metrics: Sequence[dict[str, float]], key: str, less: str | None = None) -> dict[str, Any] | None:
    """Over seeds, of a metric, or of how much more it is than another one."""
    keys = {key, less or key}
    values = [one[key] - (0.0 if less is None else one[less]) for one in metrics if keys <= set(one)]
    return over_seeds(values).row if values else None


def write_results(folder: Path, name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> list[Path]:
    """`NAME.json`, `.csv`, `.md` and `.png` in `folder`; their paths. `about`: command, hardware, time and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.{kind}" for kind in ("json", "csv", "md", "png")]
    written[0].write_text(json.dumps({**about, "rows": rows}, indent=1, sort_keys=True) + "\n")
    written[1].write_text(_csv(rows))
    written[2].write_text(_markdown(name, rows, about))
    (_plot_agents if len({row["agents"] for row in rows}) > 1 else _plot_models)(rows, written[3])
    return written


def _csv(rows: list[dict[str, Any]]) -> str:
    flat = []
    for row in rows:
        line: dict[str, Any] = {name: row[name] for name in ("model", "agents", "seeds")}
        for name in (*_SPREAD, *_BELOW):
            line[name] = row[name] and row[name]["mean"]
            line[f"{name}_se"] = row[name] and row[name]["se"]
        for part in "dci":
            line[f"dci_{part}"] = row["dci"] and row["dci"][part]
            line[f"dci_{part}_se"] = row["dci_se"] and row["dci_se"][part]
        flat.append(line | {name: row[name] for name in ("leakage", "leakage_se", "seconds")})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]) if flat else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _markdown(name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [
        f"# {name}",
        "",
        "Mean ± standard error over seeds, on held-out episodes; docs/metrics.md says what each number is.",
        "",
        *(f"- {key.replace('_', ' ')}: {value}" for key, value in about.items()),
        "",
        "| model | agents | seeds | " + " | ".join(_MARKDOWN) + " | D / C / I | leakage | minutes |",
        "|" + "---|" * (len(_MARKDOWN) + 6),
    ]
    for row in rows:
        dci = " / ".join(f"{row['dci'][part]:.2f}" for part in "dci") if row["dci"] else "-"
        leakage = "-" if row["leakage"] is None else f"{row['leakage']:.1%}"
        leakage += "" if row["leakage_se"] is None else f" ± {row['leakage_se']:.1%}"
        values = " | ".join(_shown(row[key]) for key in _MARKDOWN)
        lines.append(
            f"| {row['model']} | {row['agents']} | {row['seeds']} | {values} | {dci} | {leakage} | "
            f"{row['seconds'] / 60:.1f} |"
        )
    for row in rows:
        for seed, found in row["findings"].items():
            if found:
                lines.append(f"\n{row['model']}, {row['agents']} agents, seed {seed}, at its end: {', '.join(found)}")
        for seed, reason in row["failed"].items():
            lines.append(f"\n{row['model']}, {row['agents']} agents, seed {seed}: {reason}")
    return "\n".join(lines) + "\n"


def _shown(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['mean']:.2f}" + ("" if estimate["se"] is None else f" ± {estimate['se']:.2f}")


_PANELS: dict[str, Callable[[dict[str, Any]], tuple[float, float] | None]] = {
    "PSNR after 1 step, dB": lambda row: _pair(row["psnr@1"]),
    "PSNR after 10 steps, dB": lambda row: _pair(row["psnr@10"]),
    "below the tokenizer's ceiling after 10 steps, dB": lambda row: _pair(row["below_ceiling@10"]),
    "action probe: what can be seen, told": lambda row: _pair(row["action_probe"]),
    "position probe (DCI's I)": lambda row: _pair(row["position_probe"]),
    "leakage": lambda row: None if row["leakage"] is None else (row["leakage"], row["leakage_se"] or 0.0),
}

_SHARES = ("action probe: what can be seen, told", "position probe (DCI's I)", "leakage")


def _pair(estimate: dict[str, Any] | None) -> tuple[float, float] | None:
    """Mean and error bar."""
    return None if estimate is None else (estimate["mean"], estimate["se"] or 0.0)


def _plot_agents(rows: list[dict[str, Any]], place: Path) -> None:
    """Each model's numbers over the number of agents, and the tokenizer's and copying's beside."""
    figure, grid = plt.subplots(2, len(_PANELS) // 2, figsize=(16, 8.4), constrained_layout=True)
    axes = grid.flatten()
    for axis, (title, value) in zip(axes, _PANELS.items(), strict=True):
        for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            points = [(row["agents"], value(row)) for row in rows if row["model"] == model]
            known = sorted((agents, *found) for agents, found in points if found is not None)
            if known:
                agents, means, errors = zip(*known, strict=True)
                style = {"marker": "o", "capsize": 3, "linewidth": 1.5, "color": f"C{number}"}  # in all panels alike
                axis.errorbar(agents, means, errors, label=model, **style)
        for name, column, style in (("ceiling", "ceiling", ":"), ("copy the frame", None, "--")):
            key = column or ("copy@1" if "1 step" in title else "copy@10")
            if title.startswith("PSNR"):
                # A study on its way has rows of fewer seeds; of each world the row with most has the last word.
                by_seeds = sorted(rows, key=lambda row: row["seeds"])
                known = sorted({row["agents"]: row[key]["mean"] for row in by_seeds if row[key]}.items())
                axis.plot(*zip(*known, strict=True), style, color="0.4", label=name)
        axis.set(title=title, xlabel="agents", xticks=sorted({row["agents"] for row in rows}))
        if title in _SHARES:
            axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(place, dpi=110)
    plt.close(figure)


def _plot_models(rows: list[dict[str, Any]], place: Path) -> None:
    """A bar for each model."""
    height = 1.2 + 0.35 * len(rows)
    figure, grid = plt.subplots(2, len(_PANELS) // 2, figsize=(15, 2 * height), sharey=True)
    axes = grid.flatten()
    for axis, (title, value) in zip(axes, _PANELS.items(), strict=True):
        known = [(row["model"], *found) for row in rows if (found := value(row)) is not None]
        if known:
            names, means, errors = zip(*known, strict=True)
            axis.barh(names, means, xerr=errors, capsize=3, color="#4c78a8")
        axis.set_title(title)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(place, dpi=110)
    plt.close(figure)


def describe_hardware(tasks: int, threads: int, gpus: float) -> str:
    """What trainings ran on, in words."""
    at_a_time = f"{tasks} trainings at a time with {threads} thread(s) each"
    share = f", {gpus:g} GPU a training" if gpus else ""
    return f"{hardware(torch.device('cuda' if gpus else 'cpu'))}{share}; {at_a_time}"

"""What policies earn: rows with mean and standard error over seeds, as JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from flam_core.evaluation.stats import over_seeds
from services.policy.plan import LABELLED, Cell

Result = tuple[Cell, dict[str, Any]]
NAME = "policy"
_FAR_ABOVE = 3.0
"""Times the best policy."""
_COLOURS = {"flam": "#c0392b", "bc": "#2c6fbb", "bc-all": "#2c6fbb", "expert": "0.25", "random": "0.6"}
_LINES = {"bc-all": "--", "expert": "-", "random": ":"}


def rows_of(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row for each environment, method and number of labels, in the order in which they first appear.

    `return`, `label_accuracy` and `policy_accuracy` are {mean, se, low, high, n} over seeds, or null where there is no
    such thing; `over_bc` is the same of flam's return less that of bc with the same labels and seed.
    """
    groups: defaultdict[tuple[str, str, int | None], dict[int, dict[str, Any]]] = defaultdict(dict)
    for cell, result in results:
        groups[cell.env, cell.method, cell.labels][cell.seed] = result
    rows = []
    for (env, method, labels), group in groups.items():
        rival = groups.get((env, "bc", labels), {}) if method == "flam" else {}
        gains = [group[seed]["return"] - rival[seed]["return"] for seed in group if seed in rival]
        row: dict[str, Any] = {"env": env, "labels": labels, "method": method, "seeds": len(group)}
        row |= {key: _estimate(group.values(), key) for key in ("return", "label_accuracy", "policy_accuracy")}
        row["over_bc"] = over_seeds(gains).row if gains else None
        row["slots"] = {str(seed): one["slot"] for seed, one in group.items()} if method == "flam" else None
        row["transitions"] = next((one["transitions"] for one in group.values()), None)
        row["seconds"] = sum(one["seconds"] for one in group.values()) / len(group)
        rows.append(row)
    return rows


def _estimate(results: Iterable[dict[str, Any]], key: str) -> dict[str, Any] | None:
    values = [one[key] for one in results if one[key] is not None]
    return over_seeds(values).row if values else None


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The return of each row, in words."""
    found = {}
    for row in rows:
        labels = "" if row["labels"] is None else f", {row['labels']} labels"
        found[f"{row['env']}, {row['method']}{labels}"] = _shown(row["return"])
    return found


def write_results(folder: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> list[Path]:
    """`policy.json`, `.md` and `.png` in `folder`; their paths. `about`: command, hardware, data, time and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{NAME}.{kind}" for kind in ("json", "md", "png")]
    written[0].write_text(json.dumps({**about, "rows": rows}, indent=1, sort_keys=True) + "\n")
    written[1].write_text(_markdown(rows, about))
    _plot(rows, written[2])
    return written


def _markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [
        "# Policies from few labels",
        "",
        "Mean ± standard error over seeds, on levels that the data do not show; docs/policy.md says what is what.",
        "",
        *(f"- {key.replace('_', ' ')}: {value}" for key, value in _flat(about).items()),
        "",
        "| env | labels | method | seeds | return | over bc | true pseudo-labels | policy does as the expert |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['env']} | {row['labels'] or '-'} | {row['method']} | {row['seeds']} | {_shown(row['return'])} | "
            f"{_shown(row['over_bc'])} | {_shown(row['label_accuracy'], share=True)} | "
            f"{_shown(row['policy_accuracy'], share=True)} |"
        )
    return "\n".join(lines) + "\n"


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values, each by its whole path; what is not known is left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{above}{key}": _shown(value)} if "mean" in value else _flat(value, f"{above}{key}, ")
        elif value is not None:
            found[f"{above}{key}"] = f"{value:.1f}" if isinstance(value, float) else value
    return found


def _shown(estimate: Mapping[str, Any] | None, *, share: bool = False) -> str:
    if estimate is None:
        return "-"
    kind = ".1%" if share else ".2f"
    return f"{estimate['mean']:{kind}}" + ("" if estimate["se"] is None else f" ± {estimate['se']:{kind}}")


def _plot(rows: list[dict[str, Any]], place: Path) -> None:
    """Returns over the number of labels, a panel for each environment; those without labels are lines across."""
    envs = list(dict.fromkeys(row["env"] for row in rows))
    figure, axes = plt.subplots(1, len(envs), figsize=(5.2 * len(envs), 4), squeeze=False, constrained_layout=True)
    for axis, env in zip(axes[0], envs, strict=True):
        _panel(axis, [row for row in rows if row["env"] == env])
        axis.set(xlabel="labelled transitions", ylabel="return on unseen levels")
        axis.set_title(env, loc="left")
    named = {name: line for axis in axes[0] for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=len(named), fontsize=8)
    figure.savefig(place, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        if method in LABELLED:
            mine = sorted(mine, key=lambda row: row["labels"])
            means, errors = [row["return"]["mean"] for row in mine], [row["return"]["se"] or 0.0 for row in mine]
            labels = [row["labels"] for row in mine]
            axis.errorbar(labels, means, errors, marker="o", capsize=3, label=method, color=_COLOURS[method])
            axis.set_xscale("log")
            axis.set_xlim(labels[0] / 2, labels[-1] * 2)
            axis.set_xticks(labels, [f"{one:,}" for one in labels])
            axis.minorticks_off()
        else:
            (row,) = mine
            mean, error = row["return"]["mean"], row["return"]["se"] or 0.0
            axis.axhline(mean, color=_COLOURS[method], linestyle=_LINES[method], label=method)
            axis.axhspan(mean - error, mean + error, color=_COLOURS[method], alpha=0.12, linewidth=0)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    _leave_out_expert(axis, rows)
    axis.grid(alpha=0.3)


def _leave_out_expert(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Where it is far above all policies, it is said and not drawn: they would be one line at the bottom."""
    expert = [row["return"] for row in rows if row["method"] == "expert"]
    others = [row["return"]["mean"] for row in rows if row["method"] != "expert"]
    if expert and others and expert[0]["mean"] > _FAR_ABOVE * max(others):
        axis.set_ylim(min(0.0, 1.2 * min(others)), 1.2 * max(others))
        axis.set_title(f"expert: {_shown(expert[0])}, far above", loc="right", fontsize=8)

"""Pictures of a sweep, as PNG: the surface, the Pareto front, parallel coordinates, learning curves, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flam_core.evaluation.pictures import png
from services.sweep.analysis import PointSummary, label, pareto, summaries

_MARKS = "os^DvP*X"
_STOPPED = "#d55e00"


def surface_png(found: Mapping[str, Any]) -> bytes:
    """The main metric over K and codebook, mean and standard error over seeds; a panel for each of the other settings'
    values. Points none of whose trials came to the end are named by what stopped them."""
    points = summaries(found)
    goal = found["objectives"][0]
    factors, codebooks = (sorted({p.settings[name] for p in points}) for name in ("factors", "codebook"))
    rest = sorted({_rest(point) for point in points})
    known = [p.estimates[goal["metric"]].mean for p in points if goal["metric"] in p.estimates]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    figure = Figure(figsize=(1.6 + (1.1 * len(factors) + 1.4) * len(rest), 1.6 + 0.8 * len(codebooks)), dpi=110)
    figure.set_layout_engine("constrained")
    axes = np.atleast_1d(figure.subplots(1, len(rest), sharey=True))
    image = None
    for axis, others in zip(axes, rest, strict=True):
        grid = np.full((len(codebooks), len(factors)), np.nan)
        for point in (p for p in points if _rest(p) == others):
            row, column = codebooks.index(point.settings["codebook"]), factors.index(point.settings["factors"])
            estimate = point.estimates.get(goal["metric"])
            if estimate is None:
                said = "\n".join(point.stopped)
            else:
                grid[row, column] = estimate.mean
                said = f"{estimate.mean:.2f}" + ("" if estimate.se is None else f"\n± {estimate.se:.2f}")
            light = estimate is not None and high > low and (estimate.mean - low) / (high - low) < 0.6
            axis.text(column, row, said, ha="center", va="center", fontsize=8, color="white" if light else "black")
        image = axis.imshow(grid, vmin=low, vmax=high if high > low else low + 1, aspect="auto", cmap="viridis")
        axis.set_xticks(range(len(factors)), [str(k) for k in factors])
        axis.set_yticks(range(len(codebooks)), [str(c) if c else "Gaussian" for c in codebooks])
        axis.set(xlabel="factors K", title=others)
    axes[0].set_ylabel("codebook")
    if image is not None:
        figure.colorbar(image, ax=list(axes), label=goal["title"])
    return png(figure)


def pareto_png(found: Mapping[str, Any]) -> bytes:
    """The main metric against bits a step and against speed; those that nothing beats are ringed."""
    points, goals = summaries(found), found["objectives"]
    front = {point.label + _rest(point) for point in pareto(points, goals)}
    main, against = goals[0], goals[-2:]
    figure = Figure(figsize=(6.2 * len(against), 4.4), dpi=110, layout="constrained")
    for axis, goal in zip(np.atleast_1d(figure.subplots(1, len(against))), against, strict=True):
        known = [p for p in points if main["metric"] in p.estimates and goal["metric"] in p.estimates]
        for i, point in enumerate(known):
            x, y = point.estimates[goal["metric"]], point.estimates[main["metric"]]
            best = point.label + _rest(point) in front
            axis.errorbar(
                x.mean,
                y.mean,
                xerr=x.se or 0.0,
                yerr=y.se or 0.0,
                marker=_MARKS[i % len(_MARKS)],
                color=f"C{i % 10}",
                markeredgecolor="black" if best else "none",
                markeredgewidth=1.6 if best else 0,
                markersize=9,
                capsize=3,
                label=f"{point.label}, {_rest(point)}" if len({_rest(p) for p in points}) > 1 else point.label,
            )
        better = "right" if goal["direction"] == "maximize" else "left"
        axis.set(xlabel=f"{goal['title']} (better: {better})", ylabel=main["title"])
        axis.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return png(figure)


def parallel_png(found: Mapping[str, Any]) -> bytes:
    """Settings and objectives side by side, a line for each trial that was measured; the better, the brighter."""
    goals = found["objectives"]
    rows = [row for row in found["trials"] if goals[0]["metric"] in row["metrics"]]
    varied = [n for n in ("factors", "codebook", "latent_width", "beta", "fsq") if len({r[n] for r in rows}) > 1]
    columns = [(name, [row[name] for row in rows]) for name in varied]
    for goal in goals:
        values = [row["metrics"].get(goal["metric"]) for row in rows]
        known = [value for value in values if value is not None]
        if known:  # where one alone lacks it, it is drawn at the end that is worse
            worse = min(known) if goal["direction"] == "maximize" else max(known)
            columns.append((goal["title"], [worse if value is None else value for value in values]))
    figure = Figure(figsize=(2.0 * max(2, len(columns)), 4.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    heights = np.zeros((len(rows), len(columns)))
    for i, (name, values) in enumerate(columns):
        ticks = _ticks(values)
        scaled = [ticks[value] if value in ticks else _between(value, values) for value in values]
        heights[:, i] = scaled
        axis.axvline(i, color="0.6", linewidth=0.8)
        marks = ticks or {value: _between(value, values) for value in (min(values, default=0), max(values, default=0))}
        for value, height in marks.items():
            said = value if isinstance(value, str) else f"{value:.3g}"
            axis.text(i + 0.03, height, said, fontsize=8, va="center")
        axis.text(i, 1.12, name.replace(", ", ",\n"), fontsize=9, ha="center", va="bottom")
    main = len(varied)
    for row, line in zip(rows, heights, strict=True):
        colour = matplotlib.colormaps["viridis"](line[main])
        axis.plot(range(len(columns)), line, color=colour, alpha=0.8, linestyle="-" if not row["stopped_by"] else ":")
    axis.set(xlim=(-0.3, len(columns) - 0.4), ylim=(-0.08, 1.08))
    axis.axis("off")
    return png(figure)


def curves_png(found: Mapping[str, Any]) -> bytes:
    """The main metric of each trial while it trained, a colour for each point; a cross where it was stopped."""
    goal = found["objectives"][0]
    figure = Figure(figsize=(9.0, 4.8), dpi=110, layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(_name(row) for row in found["trials"]))
    for row in found["trials"]:
        known = [
            (look["step"], look["metrics"][goal["metric"]])
            for look in row["looks"]
            if goal["metric"] in look["metrics"]
        ]
        if not known:
            continue
        steps, values = zip(*known, strict=True)
        i = names.index(_name(row))
        first = row is next(one for one in found["trials"] if _name(one) == _name(row))
        dashes = ("-", "--", "-.", ":")[i // 10 % 4]
        axis.plot(
            steps, values, linewidth=1.3, label=_name(row) if first else None, color=f"C{i % 10}", linestyle=dashes
        )
        if row["stopped_by"]:
            axis.plot(steps[-1], values[-1], "x", color=_STOPPED, markersize=9, markeredgewidth=2)
    axis.plot([], [], "x", color=_STOPPED, label="stopped")
    axis.set(xlabel="steps", ylabel=f"{goal['title']} (split val)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return png(figure)


def costs_png(found: Mapping[str, Any]) -> bytes:
    """Minutes of each trial; those that were stopped in another colour."""
    rows = found["trials"]
    figure = Figure(figsize=(8.0, 1.0 + 0.24 * len(rows)), dpi=110, layout="constrained")
    axis = figure.subplots()
    colours = [_STOPPED if row["stopped_by"] else "#0072b2" for row in rows]
    axis.barh(
        [f"{_name(row)}, seed {row['seed']}" for row in rows], [row["seconds"] / 60 for row in rows], color=colours
    )
    for i, row in enumerate(rows):
        if row["stopped_by"]:
            axis.text(row["seconds"] / 60, i, f" {row['stopped_by'].partition(':')[0]}", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.set_xlabel("minutes")
    _room_at_right(axis)
    return png(figure)


def _room_at_right(axis: Axes) -> None:
    left, right = axis.get_xlim()
    axis.set_xlim(left, right * 1.15)


def _rest(point: PointSummary) -> str:
    """What else tells a point from others: beta and tokenizer."""
    return f"beta {point.settings['beta']:g}, FSQ {point.settings['fsq']}"


def _name(row: Mapping[str, Any]) -> str:
    return f"{label(row)}, beta {row['beta']:g}"


def _ticks(values: Sequence[Any]) -> dict[Any, float]:
    """Heights of a setting with few values, evenly spaced; none for measured numbers."""
    distinct = sorted(set(values))
    if len(distinct) > 8 or (len(distinct) > 2 and all(isinstance(value, float) for value in distinct)):
        return {}
    return {value: i / max(1, len(distinct) - 1) for i, value in enumerate(distinct)}


def _between(value: float, values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return 0.5 if high == low else (value - low) / (high - low)

"""A sweep's results as files: sweep.json, pictures, and one page that says which settings the data want."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from flam_core.evaluation.report import STYLE
from flam_core.evaluation.stats import Estimate
from services.storage import Location, write_bytes
from services.sweep.analysis import (
    PointSummary,
    best,
    differences,
    next_steps,
    pareto,
    reasons,
    summaries,
    wanted_factors,
)
from services.sweep.pictures import costs_png, curves_png, parallel_png, pareto_png, surface_png
from services.sweep.prepare import Sweep

_PICTURES: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], bytes]]] = {
    "surface": (
        "Over factors and codebook",
        "Mean and standard error over the seeds that came to the end. A cell that names a reason has none.",
        surface_png,
    ),
    "pareto": (
        "What quality costs",
        "Ringed in black: nothing else is at least as good in all objectives at once.",
        pareto_png,
    ),
    "parallel": ("All trials", "A line for each, dotted if it was stopped; the brighter, the better.", parallel_png),
    "curves": ("While they trained", "On held-out clips of the split val. A cross: stopped there.", curves_png),
    "costs": ("What each trial took", "Wall time of its run over all attempts, evaluation included.", costs_png),
}


@dataclass(frozen=True)
class Report:
    """A sweep's report, written."""

    place: Location
    """Of the page."""
    page: str
    content: str
    """Of `sweep.json`."""
    tags: dict[str, str]
    """What it comes to, for MLflow and for people: `best`, `factors` and `trials`."""


def write_report(sweep: Sweep, found: Mapping[str, Any]) -> Report:
    """Write `sweep.json`, the pictures and `report.html` into the sweep's folder."""
    content = json.dumps(found, indent=1, sort_keys=True) + "\n"
    write_bytes(sweep.folder / "sweep.json", content.encode())
    pictures = {name: draw(found) for name, (_, _, draw) in _PICTURES.items()}
    for name, picture in pictures.items():
        write_bytes(sweep.folder / f"{name}.png", picture)
    html = page(found, pictures)
    write_bytes(sweep.folder / "report.html", html.encode())
    goal = found["objectives"][0]
    tags = {"trials": str(len(found["trials"]))}
    if wanted := wanted_factors(found):
        tags["factors"] = f"{wanted[0]}: {wanted[1]}"
    if top := best(summaries(found), goal["metric"]):
        tags["best"] = (
            f"{top.label}, beta {top.settings['beta']:g}: {goal['title']} {_shown(top.estimates[goal['metric']])}"
        )
    return Report(sweep.folder / "report.html", html, content, tags)


def page(found: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """One self-contained page."""
    points, goals = summaries(found), found["objectives"]
    sections = [
        f"<h1>Sweep {escape(found['sweep'])}</h1>",
        f'<p class="soft">{len(found["trials"])} trials on {escape(found["dataset"])}, recipe '
        f"{escape(found['recipe'])}, {found['steps']} steps of stage 2 each; "
        f"{sum(row['seconds'] for row in found['trials']) / 3600:.1f} hours of training in all.</p>",
        f'<div class="box">{"".join(f"<p>{escape(line)}</p>" for line in _verdict(found, points))}</div>',
        "<h2>What to try next</h2>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in next_steps(found)) + "</ul>",
        "<h2>How many factors do the data want?</h2>",
        "<p>Trials that differ in K alone, seed by seed: the difference of the main objective, with its 95 % interval. "
        "Trials that were stopped count at the newest step that both were measured at.</p>",
        _differences(found, "factors"),
        *(
            f"<h2>{escape(title)}</h2>{_differences(found, setting)}"
            for setting, title in (("codebook", "Codebook sizes"), ("beta", "Beta"), ("fsq", "Tokenizers"))
            if differences(found, setting)
        ),
    ]
    for name, (title, said, _) in _PICTURES.items():
        sections += [f"<h2>{title}</h2>", f'<p class="soft">{said}</p>', _image(pictures[name], title)]
    sections += ["<h2>All points</h2>", _points(points, goals, pareto(points, goals))]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Sweep {escape(found['sweep'])}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _verdict(found: Mapping[str, Any], points: Sequence[PointSummary]) -> list[str]:
    goal = found["objectives"][0]
    said = []
    wanted = wanted_factors(found)
    if wanted:
        said.append(f"The data want {wanted[0]} factors: {wanted[1]}.")
    top = best(points, goal["metric"])
    if top:
        value = _shown(top.estimates[goal["metric"]])
        said.append(f"Best: {top.label}, beta {top.settings['beta']:g}: {goal['title']} {value}.")
    if stopped := reasons(found["trials"]):
        said.append("Stopped: " + ", ".join(f"{count} by {why}" for why, count in sorted(stopped.items())) + ".")
    return said or ["No trial came to its end."]


def _differences(found: Mapping[str, Any], setting: str) -> str:
    rows = [
        f"<tr><td>{_value(one.value)} against {_value(one.other)}</td>"
        f'<td class="value">{one.estimate.mean:+.2f}</td>'
        f"<td>{_interval(one.estimate)}</td><td>{one.estimate.n}</td><td>{escape(one.verdict)}</td></tr>"
        for one in differences(found, setting)
    ]
    if not rows:
        return '<p class="soft">No two trials differ in it alone.</p>'
    title = escape(found["objectives"][0]["title"])
    head = f"<tr><th>{escape(setting)}</th><th>{title}</th><th>95 %</th><th>pairs</th><th></th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _points(points: Sequence[PointSummary], goals: Sequence[Mapping[str, Any]], front: Sequence[PointSummary]) -> str:
    titles = "".join(f"<th>{escape(goal['title'])}</th>" for goal in goals)
    rows = []
    for point in points:
        known = [point.estimates.get(goal["metric"]) for goal in goals]
        values = "".join(f'<td class="value">{_shown(one) if one else "-"}</td>' for one in known)
        stopped = ", ".join(f"{count} {why}" for why, count in point.stopped.items()) or "-"
        name = f"<strong>{escape(point.label)}</strong>" if point in front else escape(point.label)
        rows.append(
            f"<tr><td>{name}</td><td>{point.settings['beta']:g}</td><td>{point.settings['latent_width']}</td>"
            f"<td>{escape(str(point.settings['fsq']))}</td><td>{point.seeds}</td><td>{escape(stopped)}</td>{values}"
            f'<td class="value">{point.seconds / 60:.1f}</td></tr>'
        )
    head = (
        "<tr><th>point</th><th>beta</th><th>latent width</th><th>FSQ</th><th>ended</th><th>stopped</th>"
        f"{titles}<th>minutes</th></tr>"
    )
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _value(value: Any) -> str:
    return escape(value) if isinstance(value, str) else f"{value:g}"


def _shown(estimate: Estimate) -> str:
    return f"{estimate.mean:.3g}" + ("" if estimate.se is None else f" ± {estimate.se:.2g}")


def _interval(estimate: Estimate) -> str:
    return "-" if estimate.low is None else f"{estimate.low:+.2f} to {estimate.high:+.2f}"


def _image(content: bytes, title: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<div class="wide"><img alt="{escape(title)}" src="data:image/png;base64,{data}"></div>'

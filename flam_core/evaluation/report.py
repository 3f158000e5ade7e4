"""The evaluation as files for people and programs: metrics.json, pictures and one self-contained report.html."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from flam_core.evaluation.pictures import curves_png, failures_png, horizon_png, rollout_gif, rollout_png, slots_png
from flam_core.evaluation.rollout import RolloutResult
from flam_core.evaluation.stats import Estimate, error_key

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6570; --line: #d5dae0; --page: #ffffff; --box: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a3adb8; --line: #3a424b; --page: #15181c; --box: #20252b; }
}
body { margin: 0 auto; max-width: 68rem; padding: 1rem; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; }
.box { background: var(--box); border-radius: .5rem; padding: .75rem 1rem; }
.box p { margin: .25rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem .4rem 0; border-bottom: 1px solid var(--line); }
td.value { white-space: nowrap; font-variant-numeric: tabular-nums; font-weight: 600; }
.wide { overflow-x: auto; background: #ffffff; border: 1px solid var(--line); border-radius: .5rem; }
.wide img { display: block; min-width: 42rem; max-width: 100%; margin: 0 auto; }
.hint { display: none; }
@media (max-width: 44rem) {
  .hint { display: inline; }
  .headline tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  .headline td, .headline th { display: block; border: 0; padding: 0; }
  .headline thead { display: none; }
}
.scroll { overflow-x: auto; }
summary { cursor: pointer; }
"""


_OPTIONAL = ("slots.png", "horizon.png")


def write_report(
    folder: Path,
    result: RolloutResult,
    metrics: dict[str, float],
    info: dict[str, str],
    notes: Sequence[str] = (),
    estimates: Mapping[str, Estimate] | None = None,
    links: Mapping[str, str] | None = None,
) -> Path:
    """Write metrics.json, intervals.json, rollout.png, rollout.gif, curves.png, failures.png, slots.png (if there are
    masks), horizon.png (if there is a horizon curve) and report.html.

    metrics: as in docs/metrics.md, finite. info: what was evaluated, shown as a table of settings. notes: remarks such
    as why a metric is missing. estimates: the metrics with a spread; by default those of `result` alone. links: files
    that lie beside the report, with what they are. All text is shown as it is, markup included. The folder is created;
    each file appears whole or not at all, report.html last. Returns its path. Raises ValueError if a metric is not
    finite.
    """
    spreads = {key: estimate.row for key, estimate in (result.estimates if estimates is None else estimates).items()}
    files = {
        "metrics.json": _json(metrics),
        "intervals.json": _json(spreads),
        "rollout.png": rollout_png(result),
        "rollout.gif": rollout_gif(result),
        "curves.png": curves_png(metrics),
        "failures.png": failures_png(result),
    }
    if result.masks is not None:
        files["slots.png"] = slots_png(result)
    if any(key.startswith("horizon/psnr@") for key in metrics):
        files["horizon.png"] = horizon_png(metrics)
    files["report.html"] = _page(result, metrics, info, notes, files, links or {}).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name in set(_OPTIONAL) - set(files):
        (folder / name).unlink(missing_ok=True)  # of an earlier report
    for name, content in files.items():
        _write(folder / name, content)
    return folder / "report.html"


def _write(path: Path, content: bytes) -> None:
    """Write beside the file, then take its place: a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _page(
    result: RolloutResult,
    metrics: dict[str, float],
    info: dict[str, str],
    notes: Sequence[str],
    files: dict[str, bytes],
    links: Mapping[str, str],
) -> str:
    frames = "one true frame" if result.context == 1 else f"{result.context} true frames"
    sections = [
        "<h1>Evaluation report</h1>",
        f'<p class="soft">{result.clips} held-out clips, each predicted {result.horizon} steps ahead from {frames}.'
        "</p>",
        f'<div class="box">{"".join(f"<p>{escape(line)}</p>" for line in verdict(result, metrics))}</div>',
        "".join(f'<p><a href="{escape(file)}">{escape(what)}</a></p>' for file, what in links.items()),
        "".join(f'<p class="soft">Note: {escape(note)}</p>' for note in notes),
        "<h2>Headline numbers</h2>",
        _headline(result, metrics),
        "<h2>Predictions, frame by frame</h2>",
        f"<p>The model sees {frames} and the latent actions it inferred from the true video, nothing else. A good "
        "prediction looks like the truth; where the error row is black it is right.</p>",
        _image(files["rollout.gif"], "gif", "film of truth, prediction and error"),
        "<p></p>",
        _image(files["rollout.png"], "png", "film strips of truth, prediction and error"),
        "<h2>How quality falls with the number of steps</h2>",
        "<p>The blue line should lie well above copy and shuffled, and close to the ceiling. The bands are one "
        "standard error over episodes.</p>",
        _image(files["curves.png"], "png", "PSNR and SSIM over the steps"),
    ]
    if "horizon.png" in files:
        sections.append(_image(files["horizon.png"], "png", "PSNR over a long rollout"))
    sections += [
        "<h2>Where it fails</h2>",
        "<p>Of all held-out clips those with the largest error.</p>",
        _image(files["failures.png"], "png", "film strips of the worst clips"),
    ]
    if "slots.png" in files:
        sections += [
            "<h2>What each slot looks at</h2>",
            "<p>Bright: the slot claims this patch. Ideally each moving thing is claimed by one slot that follows it "
            "through time.</p>",
            _image(files["slots.png"], "png", "heat map of each slot's mask"),
            _slot_table(metrics),
        ]
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in info.items())
    every = "".join(
        f'<tr><td>{escape(key)}</td><td class="value">{metrics[key]:.4f}</td></tr>' for key in sorted(metrics)
    )
    sections += [
        "<h2>Settings</h2>",
        f"<table>{rows}</table>" if rows else '<p class="soft">None were given.</p>',
        "<h2>How to read this</h2>",
        _HOW_TO_READ,
        f"<details><summary>All {len(metrics)} numbers of metrics.json</summary><table>{every}</table></details>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Evaluation report</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


_HOW_TO_READ = """<ul>
<li><b>PSNR</b> (decibels) measures squared pixel error on a logarithmic scale: 3 dB more is half the error, 10 dB more
a tenth. It is computed from the error pooled over all clips. 100 dB is shown for no error at all.</li>
<li><b>SSIM</b> compares structure in small windows. 1 is equal, 0 unrelated.</li>
<li><b>Copy</b> repeats the last known frame. A model that is no better has learned nothing about movement.</li>
<li><b>Shuffled</b> gives each clip the latent actions of another clip. If it is as good as the prediction, the latent
actions carry no information; the larger the gap, the more they control.</li>
<li><b>Ceiling</b> sends the true frame through the tokenizer and back. A prediction is drawn by the same tokenizer, so
it can hardly be better.</li>
<li><b>D, C, I</b> ask whether slots stand for entities, with linear probes from each slot to each entity's true
position, scored on clips the probes have not seen. D and C only tell how knowledge is shared out; I tells how much
there is.</li>
<li><b>Action probe</b> asks whether a slot's latent action tells what its entity was told to do, beyond what the slot
itself tells, and nothing of the others.</li>
<li><b>Leakage</b> replaces one slot's latent action, keeps the others, and looks where the picture changes. 0: at that
slot's entity alone.</li>
</ul>"""


def verdict(result: RolloutResult, metrics: dict[str, float]) -> list[str]:
    """What the numbers say about the last step, in sentences. A gap counts from two standard errors on."""
    last = result.horizon
    own, own_error = metrics[f"rollout/psnr@{last}"], metrics[f"rollout/psnr_se@{last}"]
    lines = [
        f"At step {last} the prediction reaches {own:.1f} dB PSNR; the tokenizer alone reaches "
        f"{metrics[f'ceiling/psnr@{last}']:.1f} dB."
    ]
    for source, better, same, worse in (
        (
            "copy",
            "better than repeating the last known frame",
            "no better or worse than repeating the last known frame",
            "worse than repeating the last known frame",
        ),
        (
            "shuffled",
            "better than with another clip's latent actions: the latent actions matter",
            "no different with another clip's latent actions: they do not seem to matter",
            "worse than with another clip's latent actions: something is wrong",
        ),
    ):
        gap = own - metrics[f"{source}/psnr@{last}"]
        sure = 2 * (own_error**2 + metrics[f"{source}/psnr_se@{last}"] ** 2) ** 0.5
        text = same if abs(gap) <= sure else better if gap > 0 else worse
        lines.append(f"It is {f'{abs(gap):.1f} dB ' if text != same else ''}{text}.")
    own_ssim, copy_ssim = metrics[f"rollout/ssim@{last}"], metrics[f"copy/ssim@{last}"]
    if own > metrics[f"copy/psnr@{last}"] and own_ssim < copy_ssim:
        lines.append(
            f"By structure (SSIM) it is worse than repeating the last known frame, {own_ssim:.3f} against "
            f"{copy_ssim:.3f}: a sign that it blurs what it cannot tell."
        )
    return lines


def _headline(result: RolloutResult, metrics: dict[str, float]) -> str:
    """The table of the numbers that matter most, each with its meaning."""
    last = result.horizon
    rows = [
        ("rollout/psnr@1", "Prediction, one step ahead. Higher is better."),
        (f"rollout/psnr@{last}", f"Prediction, {last} steps ahead, each step built on the one before."),
        (f"rollout/ssim@{last}", f"The same frames compared by structure, {last} steps ahead (1 is equal)."),
        (f"copy/psnr@{last}", f"Repeating the last known frame for {last} steps: what no model at all would score."),
        (f"shuffled/psnr@{last}", "Prediction with another clip's latent actions: should be clearly lower."),
        ("ceiling/psnr", "The true frames through the tokenizer and back: the best that can be hoped for."),
        ("ceiling/ssim", "The same, compared by structure."),
    ]
    if "dci/d" in metrics:
        rows += [
            ("dci/d", "Disentanglement: 1 if each slot knows of one entity only."),
            ("dci/c", "Completeness: 1 if each entity is known to one slot only."),
            ("dci/i", "Informativeness: how well the slot of an entity tells its position (held-out R2, 0 to 1)."),
            ("dci/within", "Share of frames in which that position is right to 1/16 of the frame in x and in y."),
        ]
    rows += [
        ("action_probe/accuracy", "How often a linear probe reads what an entity was told from its latent action."),
        ("action_probe/others_gain", "The same for other entities, over what the state tells. Should not exceed 0."),
        ("leakage", "Of what a latent action changes in the picture, the share beyond its entity. Lower is better."),
        ("slots/used", "Slots whose latent action matters or who claim what moves."),
    ]
    body = []
    for key, meaning in dict(rows).items():
        if key not in metrics:
            continue  # the notes say why
        unit = " dB" if "/psnr" in key else ""
        error = metrics.get(error_key(key))
        digits = 2 if unit else 3
        spread = f" &plusmn; {error:.{digits}f}" if error is not None else ""
        body.append(
            f'<tr><td><code>{escape(key)}</code></td><td class="value">{metrics[key]:.{digits}f}{spread}{unit}</td>'
            f"<td>{escape(meaning)}</td></tr>"
        )
    absent = "D, C and I are missing: they need clips with the true positions of entities that are in view and move."
    return (
        '<table class="headline"><thead><tr><th>Metric</th><th>Value</th><th>What it says</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>" + ("" if "dci/d" in metrics else f"<p>{absent}</p>")
    )


def _slot_table(metrics: dict[str, float]) -> str:
    """A row a slot: its entity, what its latent action costs when replaced, its share of what moves, its verdict."""
    if "slots/used" not in metrics:
        return ""
    rows = []
    for i in range(sum(re.fullmatch(r"slots/\d+/used", key) is not None for key in metrics)):
        entity = metrics.get(f"slots/{i}/entity")
        cells = [f"{i}", "none" if entity is None else f"{entity:.0f}"]
        for key, form in ((f"slots/{i}/effect_db", "{:.2f} dB"), (f"slots/{i}/moving_share", "{:.1%}")):
            cells.append(form.format(metrics[key]) if key in metrics else "not measured")
        cells.append("yes" if metrics[f"slots/{i}/used"] else "no")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        "<table><thead><tr><th>Slot</th><th>Entity</th><th>Cost of replacing its latent action</th>"
        f"<th>Share of moving patches</th><th>In use</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def _image(content: bytes, kind: str, alternative: str) -> str:
    data = base64.b64encode(content).decode()
    return (
        f'<div class="wide" tabindex="0"><img alt="{escape(alternative)}" src="data:image/{kind};base64,{data}"></div>'
        '<p class="soft hint">Swipe sideways to see all of it.</p>'
    )

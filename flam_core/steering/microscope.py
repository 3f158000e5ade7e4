"""The action microscope: one self-contained page that shows what each code of each slot does."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from html import escape

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flam_core.evaluation.pictures import paint_masks, slot_colours
from flam_core.evaluation.report import STYLE
from flam_core.model import Flam
from flam_core.steering.discovered import DiscoveredActions
from flam_core.steering.traversals import STEPS, Traversal, traverse

MICROSCOPE_FILE = "microscope.html"
SCENES = 3
_WEIGHT = 2_400_000
"""Bytes of all pictures, as they are in the page; the rest of it is small."""
_SIDES = (96, 64, 48, 32, 24, 16)
"""Pixels that large frames are shrunk to, the first that keeps the page light."""
_SHOWN = 128
"""Pixels that a frame is shown at."""
_STYLE = """
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem;
  vertical-align: -.05rem; }
section { border-top: 1px solid var(--line); margin-top: 1.5rem; }
.scroll th { overflow-wrap: normal; vertical-align: bottom; }
.scroll td { white-space: nowrap; }
.codes { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .75rem; }
.code { background: var(--box); border-radius: .5rem; padding: .6rem .75rem .75rem; }
.code h3 { font-size: 1rem; margin: 0; display: flex; align-items: center; gap: .5rem; }
.code h3 svg { flex: none; }
.code .bar { height: .3rem; border-radius: .15rem; background: var(--line); margin: .35rem 0 .5rem; }
.code .bar i { display: block; height: 100%; border-radius: .15rem; }
.row { display: flex; gap: .4rem; }
.film { flex: 1; aspect-ratio: 1; max-width: SIDEpx; image-rendering: pixelated; border-radius: .25rem;
  background-repeat: no-repeat; background-size: calc(FRAMES * 100%) calc(ROWS * 100%); background-position-x: 100%;
  animation: play 3s steps(FRAMES, jump-none) infinite; }
@keyframes play { 0% { background-position-x: 0%; } 75%, 100% { background-position-x: 100%; } }
.start { margin: .5rem 0 1rem; max-width: 27rem; }
.start img { flex: 1; min-width: 0; max-width: SIDEpx; image-rendering: pixelated; border-radius: .25rem; }
#pause:checked ~ main .film { animation-play-state: paused; }
@media (prefers-reduced-motion: reduce) { .film { animation: none; } }
"""


@torch.no_grad()
def microscope(
    model: Flam, discovered: DiscoveredActions, frames_u8: Tensor, metrics: Mapping[str, float], title: str
) -> str:
    """The page, as HTML that needs nothing beside it and weighs less than 3 MB for up to 16 slots.

    frames_u8: clips uint8 [N, T, H, W, 3], whose first frames are the scenes. metrics: of the evaluation, as in
    docs/metrics.md; what is missing there is missing here.
    """
    scenes = frames_u8[:SCENES, :1]
    films = traverse(model, discovered, scenes, [k for k in range(discovered.slots) if _used(metrics, k)])
    masks = model.slots(model.encode(scenes.to(next(model.parameters()).device)))[1]
    colours = slot_colours(discovered.slots)
    order = sorted(range(discovered.slots), key=lambda k: (not _used(metrics, k), k))
    sprites = _sprites([film.frames for film in films])
    rules = [
        f".{_name(film)} {{ background-image: url(data:image/png;base64,{sprite}); }}"
        for film, sprite in zip(films, sprites, strict=True)
    ]
    sections = []
    for k in order:
        start = "" if masks is None else _start(scenes[:, 0].numpy(), masks[:, 0].float().cpu().numpy(), k)
        ways = [_way_card(film, len(scenes)) for film in films if film.slot == k and isinstance(film.done, str)]
        codes = [
            _card(discovered, film, colours[k], len(scenes)) for film in films if film.slot == k and film.code >= 0
        ]
        sections.append(_section(discovered, k, colours[k], metrics, start, ways, codes))
    style = _STYLE.replace("FRAMES", str(STEPS + 1)).replace("ROWS", str(len(scenes))).replace("SIDE", str(_SHOWN))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Action microscope</title>'
        f"<style>{STYLE}{style}{_rows_style(len(scenes))}\n" + "\n".join(rules) + "</style></head>\n<body>\n"
        f"<h1>Action microscope</h1>\n<p class='soft'>{escape(title)}</p>\n{_INTRODUCTION}\n"
        '<input type="checkbox" id="pause"> <label for="pause">Hold the films</label>\n<main>\n'
        f"{_table(discovered, metrics, colours)}\n{_numbers(metrics)}\n"
        + "\n".join(sections)
        + "\n</main>\n</body></html>\n"
    )


_INTRODUCTION = """<p>Each slot of the model has a latent action of its own. What the slots do in held-out clips is
sorted into <b>codes</b>: the codes of a discrete latent action, or clusters of a continuous one. In each film a slot
does one thing five times, from a true frame on, while all other slots stand still as far as they can. In a good model a
slot moves one thing, and nothing else changes.</p>
<p><b>Sent one way</b>: at each step that latent action is taken which moves the slot the way that was asked for from
where it stands, as the arrow keys of <code>jobs/play.py</code> and <code>jobs/generate.py --mode edit --slot I
--toward left</code> do; edges, walls and
others stop it. <b>Codes</b>: the same latent action five times (<code>--code C</code>). A continuous latent
action may say from where its entity goes as well as which way; the same code can then move it differently in each
place, and <i>moves alike</i> below 1 says so.</p>"""


def _sprites(films: list[np.ndarray]) -> list[str]:
    """Each film uint8 [S, T, H, W, 3] as one PNG in base64, scenes below one another and time to the right."""
    encoded: list[str] = []
    side = films[0].shape[2]
    for smaller in (side, *(s for s in _SIDES if s < side)):
        if smaller > _SIDES[0]:
            continue  # nothing is shown larger
        encoded = [_png(_tiled(film), film.shape[0], film.shape[1], smaller) for film in films]
        if sum(map(len, encoded)) <= _WEIGHT:
            break
    return encoded


def _tiled(film: np.ndarray) -> np.ndarray:
    """[S H, T W, 3]"""
    scenes, frames, height, width, _ = film.shape
    return film.transpose(0, 2, 1, 3, 4).reshape(scenes * height, frames * width, 3)


def _png(picture: np.ndarray, rows: int, columns: int, side: int) -> str:
    image = Image.fromarray(np.ascontiguousarray(picture))
    if image.height != rows * side:
        image = image.resize((columns * side, rows * side), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _rows_style(scenes: int) -> str:
    """Which row of its picture each scene's film shows."""
    places = [0.0] if scenes == 1 else [100 * i / (scenes - 1) for i in range(scenes)]
    return "\n".join(f".r{i} {{ background-position-y: {place:.4g}%; }}" for i, place in enumerate(places))


def _start(frames: np.ndarray, masks: np.ndarray, slot: int) -> str:
    """The scenes uint8 [S, H, W, 3], painted where the slot's mask of [S, K, P] claims them."""
    painted = paint_masks(frames, masks, slot)
    side = min(painted.shape[1], _SIDES[0])
    pictures = "".join(
        f'<img alt="scene {i + 1}, slot {slot} marked" src="data:image/png;base64,{_png(one, 1, 1, side)}">'
        for i, one in enumerate(painted)
    )
    return (
        '<p class="soft">What its mask claims, in the scenes that the films start from:</p>'
        f'<div class="row start">{pictures}</div>'
    )


def _name(film: Traversal) -> str:
    """The style class of a film."""
    return f"s{film.slot}-{film.done}"


def _films(film: Traversal, scenes: int) -> str:
    """One moving picture a scene."""
    what = f"code {film.done}" if film.code >= 0 else film.done
    pictures = "".join(
        f'<div class="film {_name(film)} r{i}" role="img" aria-label="slot {film.slot}, {what}, scene {i + 1}"></div>'
        for i in range(scenes)
    )
    return f'<div class="row">{pictures}</div>'


def _way_card(film: Traversal, scenes: int) -> str:
    """How the slot goes one way, as with an arrow key."""
    return (
        f'<div class="code"><h3>{_ARROWS[str(film.done)]} {film.done}</h3>'
        f'<div class="soft">goes in {film.arrived * STEPS * scenes:.0f} of {STEPS * scenes} steps</div>'
        f"{_films(film, scenes)}</div>"
    )


_ARROWS = {"up": "&uarr;", "right": "&rarr;", "down": "&darr;", "left": "&larr;"}


def _card(discovered: DiscoveredActions, film: Traversal, colour: str, scenes: int) -> str:
    """What a code does."""
    slot, code = film.slot, film.code
    usage, motion = float(discovered.usage[slot][code]), discovered.motion[slot][code].numpy()
    alike, fastest = float(discovered.consistency[slot][code]), float(discovered.motion[slot].norm(dim=-1).max())
    names = [name for name, number in discovered.arrows(slot).items() if number == code]
    if not usage:
        moved = "never used here"
    elif alike < _ALIKE:
        moved = "its moves differ from place to place"
    else:
        moved = f"moves by {float(np.hypot(*motion)):.1%} of the frame"
    said = f" &middot; {', '.join(names)}" if names and alike >= _ALIKE else ""
    return (
        f'<div class="code"><h3>{_arrow(motion, fastest, colour) if alike >= _ALIKE else ""}<span>code {code}{said}'
        f'</span></h3><div class="soft">{usage:.0%} of its steps; {moved}</div>'
        f'<div class="bar"><i style="width:{usage:.1%};background:{colour}"></i></div>{_films(film, scenes)}</div>'
    )


_ALIKE = 0.6
"""Consistency from which a code is said to move its slot one way."""


def _arrow(motion: np.ndarray, fastest: float, colour: str) -> str:
    """An arrow as long as the move (dx, dy) is beside the slot's fastest; a dot for none."""
    speed = float(np.hypot(*motion))
    shape = f'<circle r="3" fill="{colour}"/>'
    if fastest > 0 and speed > 0.15 * fastest:
        tip, turn = 12 * speed / fastest, math.degrees(math.atan2(motion[1], motion[0]))
        line = f"M{-tip:.1f} 0 L{tip:.1f} 0 M{tip - 5:.1f} -4 L{tip:.1f} 0 L{tip - 5:.1f} 4"
        shape = (
            f'<path d="{line}" transform="rotate({turn:.0f})" stroke="{colour}" stroke-width="2.5" fill="none" '
            'stroke-linecap="round" stroke-linejoin="round"/>'
        )
    return f'<svg width="32" height="32" viewBox="-16 -16 32 32" aria-hidden="true">{shape}</svg>'


def _section(
    discovered: DiscoveredActions,
    slot: int,
    colour: str,
    metrics: Mapping[str, float],
    start: str,
    ways: list[str],
    codes: list[str],
) -> str:
    entity = discovered.entity[slot]
    whose = "" if entity is None else f", entity {entity}"
    leaks = [
        f"{metrics[key]:.1%} beyond {what}"
        for key, what in ((f"leakage@{entity}", "its entity"), (f"leakage/{slot}/in_mask", "what its mask claims"))
        if key in metrics
    ]
    leakage = f"Leakage, of what its latent action changes: {', '.join(leaks)}."
    body = f'<p class="soft">{leakage}</p>{start}' if leaks else start
    if ways:
        body += f'<h3>Sent one way</h3><div class="codes">{"".join(ways)}</div>'
    body += f'<h3>Its codes</h3><div class="codes">{"".join(codes)}</div>'
    title = f'<span class="swatch" style="background:{colour}"></span>Slot {slot}{whose}'
    if _used(metrics, slot):
        return f'<section id="slot-{slot}"><h2>{title}</h2>{body}</section>'
    return (
        f'<section id="slot-{slot}"><details><summary><h2 style="display:inline">{title}</h2> '
        f'<span class="soft">not in use</span></summary>{body}</details></section>'
    )


def _used(metrics: Mapping[str, float], slot: int) -> bool:
    """True too where it was not measured."""
    return metrics.get(f"slots/{slot}/used", 1.0) == 1.0


def _table(discovered: DiscoveredActions, metrics: Mapping[str, float], colours: list[str]) -> str:
    """A row a slot, of what was measured."""
    columns = {
        "In use": ("slots/{k}/used", lambda value: "yes" if value else "no"),
        "Cost of replacing": ("slots/{k}/effect_db", "{:.2f} dB".format),
        "Moving patches": ("slots/{k}/moving_share", "{:.0%}".format),
        "Bits": ("actions/{k}/bits", "{:.2f}".format),
        "Leakage, by entity": ("leakage@{e}", "{:.1%}".format),
        "Leakage, by mask": ("leakage/{k}/in_mask", "{:.1%}".format),
    }
    rows = []
    for k in range(discovered.slots):
        entity = discovered.entity[k]
        cells = [
            f'<a href="#slot-{k}"><span class="swatch" style="background:{colours[k]}"></span>slot {k}</a>',
            "none" if entity is None else str(entity),
            str(len(discovered.vectors[k])),
            f"{discovered.consistency[k].mean():.2f}",
        ]
        for key, shown in columns.values():
            value = metrics.get(key.format(k=k, e=entity))
            cells.append("-" if value is None else shown(value))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{name}</th>" for name in ("Slot", "Entity", "Codes", "Moves alike", *columns))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _numbers(metrics: Mapping[str, float]) -> str:
    """What is measured of all slots together, in a sentence each."""
    lines = []
    if "leakage" in metrics:
        lines.append(
            f"Leakage: of what a latent action changes in the picture, {metrics['leakage']:.1%} lies beyond its "
            "entity, over all slots that have one."
        )
    if "leakage/in_mask" in metrics:
        lines.append(
            f"Leakage by masks: {metrics['leakage/in_mask']:.1%} of the change lies beyond the patches that its slot "
            "claims. The table has both of each slot; 0 is best, and a slot whose action changes nothing has none."
        )
    if "actions/usage" in metrics:
        lines.append(f"{metrics['actions/usage']:.0%} of the codes, or latent dimensions, are in use.")
    lines += [
        "Moves alike: 1 if each code moves its slot the same way everywhere, 0 if it moves it all ways.",
        "Entities are numbered as in the data set's ground truth, where it has any.",
    ]
    return f'<p class="soft">{" ".join(lines)}</p>'

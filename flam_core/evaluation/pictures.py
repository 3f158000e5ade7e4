"""Pictures of an evaluation, as bytes of PNG and GIF files: what was predicted, where it went wrong, what slots see."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont

from flam_core.evaluation.image import psnr
from flam_core.evaluation.rollout import RolloutResult

ERROR_GAIN = 3
"""Errors are drawn this much brighter than they are: at 1 a wrong grey level cannot be seen."""
COLUMNS = 11
"""Frames a picture shows at most, evenly spread over a longer clip."""
CLIPS = 2
"""Clips a picture shows at most."""
PANEL = 224
"""Pixels: the least side of a GIF panel; small frames are enlarged by whole factors."""
_CELL, _LABEL = 1.0, 1.35  # inches: width of a frame in a strip with its gap, and of the labels to the left
_CURVES = {  # label and style of each source; the last is drawn on top, wide open marks stay visible below it
    "ceiling": ("tokenizer ceiling (true frame, encoded and decoded)", {"color": "#555555", "linestyle": "--"}),
    "copy": ("copy of the last known frame", {"color": "#d55e00", "marker": "s"}),
    "shuffled": (
        "prediction with another clip's latent actions",
        {"color": "#cc79a7", "marker": "D", "markersize": 10, "markerfacecolor": "none"},
    ),
    "rollout": ("prediction (inferred latent actions)", {"color": "#0072b2", "marker": "o", "linewidth": 2}),
}


def rollout_png(result: RolloutResult) -> bytes:
    """Film strips of up to CLIPS clips: truth, what the tokenizer makes of it, prediction, error, prediction with
    another clip's latent actions and, if there is more than one slot, masks."""
    films = []
    for clip in range(min(CLIPS, len(result.truth))):
        rows = _rows(result, clip)
        rows.insert(1, ("truth through\nthe tokenizer", result.ceiling[clip]))
        rows.insert(4, ("prediction with\nanother clip's\nlatent actions", result.shuffled[clip]))
        films.append(rows)
    columns = shown_columns(result.truth.shape[1])
    pitch = _row_height(result) + 0.08
    block = 0.6 + len(films[0]) * pitch
    figure = sheet(columns, len(films) * block + 0.5)
    for clip, film in enumerate(films):
        for row, (label, frames) in enumerate(film):
            axis = strip(figure, clip * block + 0.6 + row * pitch, label, frames[columns])
            if row == 0:
                name_columns(axis, columns, result.context, result.truth.shape[3])
                axis.set_title(f"Held-out clip {clip + 1}", loc="left", fontsize=11, fontweight="bold")
    if result.masks is not None:
        handles = [Patch(color=c, label=f"slot {k}") for k, c in enumerate(slot_colours(result.masks.shape[2]))]
        figure.legend(handles=handles, loc="lower center", ncols=min(8, len(handles)), fontsize=9, frameon=False)
    return png(figure)


def failures_png(result: RolloutResult) -> bytes:
    """Film strips of the clips that the model does worst on, up to CLIPS: truth, prediction, error."""
    clips = min(CLIPS, len(result.worst))
    columns = shown_columns(result.worst_truth.shape[1])
    pitch = _row_height(result) + 0.08
    block = 0.6 + 3 * pitch
    figure = sheet(columns, clips * block + 0.1)
    for clip in range(clips):
        truth, prediction = result.worst_truth[clip], result.worst_prediction[clip]
        rows = [("truth", truth), ("prediction", prediction), _error_row(truth, prediction)]
        for row, (label, frames) in enumerate(rows):
            axis = strip(figure, clip * block + 0.6 + row * pitch, label, frames[columns])
            if row == 0:
                name_columns(axis, columns, result.context, result.truth.shape[3])
                number = result.worst[clip]
                db = float(psnr(result.errors["rollout"][number].mean()))
                axis.set_title(f"{result.ids[number]}: {db:.1f} dB", loc="left", fontsize=11, fontweight="bold")
    return png(figure)


def rollout_gif(result: RolloutResult) -> bytes:
    """An endless film of up to CLIPS clips: truth, prediction, error and masks side by side."""
    font = ImageFont.load_default(15)
    scale = max(1, -(-PANEL // result.truth.shape[3]))
    pad, head = 10, 26
    films = [_rows(result, clip) for clip in range(min(CLIPS, len(result.truth)))]
    side_y, side_x = result.truth.shape[2] * scale, result.truth.shape[3] * scale
    width = len(films[0]) * (side_x + pad) + pad
    pages = []
    for t in range(result.truth.shape[1]):
        page = Image.new("RGB", (width, 2 * head + len(films) * (side_y + pad)), "white")
        draw = ImageDraw.Draw(page)
        step = t - result.context + 1
        moment = f"step {step} of {result.horizon}: predicted" if step > 0 else "given: the prediction starts here"
        draw.text((pad, 6), moment, fill="black", font=font)
        for row, film in enumerate(films):
            for column, (label, frames) in enumerate(film):
                corner = (pad + column * (side_x + pad), 2 * head + row * (side_y + pad))
                picture = Image.fromarray(frames[t]).resize((side_x, side_y), Image.Resampling.NEAREST)
                page.paste(picture, corner)
                if row == 0:
                    draw.text((corner[0], head + 4), label.replace("\n", " "), fill="black", font=font)
        # GIF has 256 colours: by default rare ones, such as a small entity's, are lost to many shades of the error.
        pages.append(page.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE))
    buffer = io.BytesIO()
    durations = [900 if t < result.context or t == len(pages) - 1 else 450 for t in range(len(pages))]
    pages[0].save(buffer, format="GIF", save_all=True, append_images=pages[1:], duration=durations, loop=0)
    return buffer.getvalue()


def reconstruction_png(frames: np.ndarray, drawn: np.ndarray) -> bytes:
    """True frames uint8 [N, H, W, 3] above those that the tokenizer gives back; up to COLUMNS of them."""
    columns = shown_columns(len(frames))
    pitch = _CELL * frames.shape[1] / frames.shape[2] + 0.08
    figure = sheet(columns, 2 * pitch + 0.1)
    strip(figure, 0.05, "truth", frames[columns])
    strip(figure, 0.05 + pitch, "truth through\nthe tokenizer", drawn[columns])
    return png(figure)


def curves_png(metrics: dict[str, float]) -> bytes:
    """PSNR, with a band of one standard error, and SSIM over the steps of the rollout, for all four sources."""
    horizon = sum(key.startswith("rollout/psnr@") for key in metrics)
    steps = np.arange(1, horizon + 1)
    figure = Figure(figsize=(9.6, 4.6), dpi=110, layout="constrained")
    for axis, name, unit in zip(figure.subplots(1, 2), ("psnr", "ssim"), ("PSNR (dB)", "SSIM (1: equal)"), strict=True):
        for source, (label, style) in _CURVES.items():
            values = np.array([metrics[f"{source}/{name}@{k}"] for k in steps])
            axis.plot(steps, values, label=label, **({"markersize": 5} | style))
            if name == "psnr":
                error = np.array([metrics[f"{source}/psnr_se@{k}"] for k in steps])
                axis.fill_between(steps, values - error, values + error, color=style["color"], alpha=0.2, linewidth=0)
        axis.set_title(f"{name.upper()} of the predicted frames (higher is better)", fontsize=11)
        axis.set_xlabel("steps after the last known frame")
        axis.set_ylabel(unit)
        axis.set_xticks(np.unique(np.linspace(1, horizon, 10).round().astype(int)))
        axis.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    return png(figure)


def horizon_png(metrics: dict[str, float]) -> bytes:
    """PSNR of the long rollout and of the last known frame, with bands of one standard error."""
    steps = sorted(int(key.partition("@")[2]) for key in metrics if key.startswith("horizon/psnr@"))
    figure = Figure(figsize=(6.4, 4.2), dpi=110, layout="constrained")
    axis = figure.subplots()
    for name, source in (("copy_psnr", "copy"), ("psnr", "rollout")):
        label, style = _CURVES[source]
        values = np.array([metrics[f"horizon/{name}@{k}"] for k in steps])
        error = np.array([metrics[f"horizon/{name}_se@{k}"] for k in steps])
        axis.plot(steps, values, label=label, **({"markersize": 5} | style))
        axis.fill_between(steps, values - error, values + error, color=style["color"], alpha=0.2, linewidth=0)
    axis.set_title("PSNR of a long rollout (higher is better)", fontsize=11)
    axis.set_xlabel("steps after the last known frame")
    axis.set_ylabel("PSNR (dB)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, fontsize=10, frameon=False)
    return png(figure)


def slots_png(result: RolloutResult) -> bytes:
    """How strongly each slot claims each patch, over the frames of the first clip. Raises ValueError without masks."""
    if result.masks is None:
        raise ValueError("a model with one factor has no masks to draw")
    frames, masks = result.truth[0], result.masks[0]
    columns = shown_columns(len(frames))
    pitch = _row_height(result) + 0.08
    figure = sheet(columns, 0.35 + (masks.shape[1] + 1) * pitch + 0.75)
    axis = strip(figure, 0.35, "truth", frames[columns])
    name_columns(axis, columns, result.context, result.truth.shape[3])
    for k, colour in enumerate(slot_colours(masks.shape[1])):
        heat = enlarge_masks(masks[columns, k : k + 1], frames.shape[1:3])[:, 0]
        axis = strip(figure, 0.35 + (k + 1) * pitch, f"slot {k}", heat)
        axis.yaxis.label.set_color(colour)
    height = figure.get_figheight()
    bar = figure.add_axes((0.3, 0.5 / height, 0.4, 0.12 / height))
    figure.colorbar(
        ScalarMappable(Normalize(0, 1), "viridis"),
        cax=bar,
        orientation="horizontal",
        label="share of the patch that the slot claims",
    )
    return png(figure)


def _rows(result: RolloutResult, clip: int) -> list[tuple[str, np.ndarray]]:
    """Labels and films uint8 [T, H, W, 3] of one clip."""
    truth, prediction = result.truth[clip], result.prediction[clip]
    rows = [("truth", truth), ("prediction", prediction), _error_row(truth, prediction)]
    if result.masks is not None:
        rows.append(("slots' masks\n(a colour each)", paint_masks(truth, result.masks[clip])))
    return rows


def paint_masks(frames: np.ndarray, masks: np.ndarray, marked: int | None = None) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] in the colours of the slots whose masks, float32 [T, K, P], claim them; uint8 again.

    marked: a slot that is to stand out; the others are grey then.
    """
    colours = np.array([to_rgb(c) for c in slot_colours(masks.shape[1])])
    if marked is not None:
        grey = np.full_like(colours, 0.75)
        grey[marked] = colours[marked]
        colours = grey
    light = frames.mean(axis=-1, keepdims=True) / 255
    # The frame shines through, so that one sees what a slot has claimed.
    claimed = np.einsum("tkhw,kc->thwc", enlarge_masks(masks, frames.shape[1:3]), colours)
    return _bytes(0.35 * light + 0.65 * claimed)


def _error_row(truth: np.ndarray, prediction: np.ndarray) -> tuple[str, np.ndarray]:
    """Of films uint8 [T, H, W, 3]."""
    error = np.abs(truth.astype(np.int16) - prediction).mean(axis=-1) / 255
    heat = matplotlib.colormaps["inferno"](np.clip(error * ERROR_GAIN, 0, 1))[..., :3]
    return f"|error| x {ERROR_GAIN}\n(black: none)", _bytes(heat)


def sheet(columns: np.ndarray, height: float) -> Figure:
    """An empty figure for strips of so many frames; height in inches."""
    return Figure(figsize=(_LABEL + len(columns) * _CELL + 0.1, height), dpi=110)


def _row_height(result: RolloutResult) -> float:
    """Inches of a strip's height."""
    return _CELL * result.truth.shape[2] / result.truth.shape[3]


def strip(figure: Figure, top: float, label: str, frames: np.ndarray) -> Axes:
    """Draw frames, uint8 [T, H, W, 3] or heat in [0, 1] [T, H, W], side by side, `top` inches below the upper edge."""
    space = [(0, 0)] * frames.ndim
    space[2] = (0, _gap(frames))
    blank = 255 if frames.dtype == np.uint8 else np.nan
    picture = np.concatenate(list(np.pad(frames, space, constant_values=blank)), axis=1)
    width, height = figure.get_size_inches()
    drawn = _CELL * len(frames) * picture.shape[0] / picture.shape[1]
    axis = figure.add_axes((_LABEL / width, 1 - (top + drawn) / height, _CELL * len(frames) / width, drawn / height))
    axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.imshow(picture, interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    return axis


def name_columns(axis: Axes, columns: np.ndarray, context: int, width: int) -> None:
    """Say above a strip of frames, `width` pixels wide, which step each of them is; the first `context` are given."""
    names = ["given" if t < context else f"step {t - context + 1}" for t in columns]
    side = width + max(1, width // 16)
    axis.xaxis.tick_top()
    axis.set_xticks([i * side + width / 2 for i in range(len(columns))], names, fontsize=9)


def _gap(frames: np.ndarray) -> int:
    """Pixels between the frames [T, H, W, ...] of a strip."""
    return max(1, frames.shape[2] // 16)


def shown_columns(frames: int) -> np.ndarray:
    """Which of so many frames to show."""
    return np.unique(np.linspace(0, frames - 1, min(frames, COLUMNS)).round().astype(int))


def enlarge_masks(masks: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Masks [T, K, P] as pictures [T, K, H, W]."""
    grid = round(masks.shape[2] ** 0.5)
    square = masks.reshape(*masks.shape[:2], grid, grid)
    return square.repeat(size[0] // grid, axis=2).repeat(size[1] // grid, axis=3)


def slot_colours(slots: int) -> list[str]:
    """A colour a slot, as #rrggbb: ten strong ones, ten light ones, then the same again."""
    wheel = [matplotlib.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
    return [to_hex(wheel[k % 20]) for k in range(slots)]


def _bytes(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    # Without the name and address of the program in it: equal results, equal bytes.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()

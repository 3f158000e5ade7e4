"""What the API does with the model: infer, roll out, edit. Requests of one shape go through it together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import torch

from flam_core.errors import DataError
from flam_core.model import Flam
from flam_core.steering import generate
from services.player.models import Served
from services.player.sessions import check_way
from services.player.wire import PutActions, PutArrow, PutCode, PutPrior
from services.player.work import ToEdit, ToRoll

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def check_clip(served: Served, frames: np.ndarray) -> None:
    """Raises DataError for frames uint8 [T, H, W, 3] that are not of the model's size."""
    size = served.model.tokenizer.config.frame_size
    if frames.shape[1:] != (size, size, 3):
        height, width = frames.shape[1:3]
        raise DataError(
            f"frames have {width}x{height} pixels, and the model takes {size}x{size}", fix="Scale them, RGB."
        )


def check_roll(served: Served, asked: ToRoll, limit: int) -> None:
    """Raises DataError for frames or actions that do not fit the model or each other, or ask for too much."""
    check_clip(served, asked.frames)
    shape = (served.model.factors, served.model.dynamics.config.action_dim)
    if asked.actions.ndim != 3 or asked.actions.shape[1:] != shape:
        raise DataError(
            f"latent actions are {list(asked.actions.shape)}, and the model takes [t - 1 + S, {shape[0]}, {shape[1]}]",
            fix="Give a latent action of every slot at every step.",
        )
    steps = len(asked.actions) - len(asked.frames) + 1
    if not 1 <= steps <= limit:
        raise DataError(
            f"{len(asked.actions)} actions after {len(asked.frames)} frames make {steps} steps",
            fix=f"Give those between the frames and 1 to {limit} more.",
        )


def infer(served: Served, clips: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each clip uint8 [T, H, W, 3], its latent actions float32 [T - 1, K, A] and codes [T - 1, K], -1: none."""

    def together(same: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        frames = torch.from_numpy(np.stack(same)).to(_device(served.model))
        actions = served.model.infer_actions(served.model.slots(served.model.encode(frames))[0]).float().cpu()
        codes = served.actions.nearest(actions)
        return list(zip(actions.numpy(), codes.numpy(), strict=True))

    return _by_shape(clips, lambda clip: clip.shape, together)


def roll(served: Served, asked: Sequence[ToRoll]) -> list[np.ndarray]:
    """Of each, the frames uint8 [S, H, W, 3] that follow."""

    def together(same: Sequence[ToRoll]) -> list[np.ndarray]:
        device = _device(served.model)
        frames = torch.from_numpy(np.stack([one.frames for one in same])).to(device)
        actions = torch.from_numpy(np.stack([one.actions for one in same])).to(device)
        drawn = served.model.rollout(frames, actions, same[0].feedback)
        return list((drawn * 255).round().to(torch.uint8).cpu().numpy())

    return _by_shape(asked, lambda one: (one.frames.shape, one.actions.shape, one.feedback), together)


def edit(served: Served, asked: ToEdit) -> tuple[np.ndarray, np.ndarray]:
    """The frames uint8 [T - 1, H, W, 3] of the edited clip, and the latent actions [T - 1, K, A] that led to them.

    Raises SettingsError for a slot, a code or a direction that there is not, DataError for actions of another shape.
    """
    check_clip(served, asked.frames)
    served.actions.check_slot(asked.slot)
    clip, steps = torch.from_numpy(asked.frames), len(asked.frames) - 1
    film = generate.edit(
        served.model, clip, 1, steps, asked.slot, _replacement(served, asked, steps), feedback=asked.feedback
    )
    return film.frames.numpy(), film.actions.numpy()


def _replacement(served: Served, asked: ToEdit, steps: int) -> generate.Choose:
    put, slot, model = asked.put, asked.slot, served.model
    if isinstance(put, PutPrior):
        return generate.prior(put.seed)
    if isinstance(put, PutActions):
        own = np.asarray(put.actions, dtype=np.float32) if _even(put.actions) else np.empty(0)
        shape = (steps, model.dynamics.config.action_dim)
        if own.shape != shape:
            raise DataError(
                f"the slot's actions are {list(own.shape)}, and the clip needs {list(shape)}",
                fix="Give one for each transition.",
            )
        return generate.follow(torch.from_numpy(own)[:, None].expand(-1, model.factors, -1))
    if isinstance(put, PutCode):
        return generate.follow(served.actions.vector(slot, put.code).expand(steps, model.factors, -1))
    assert isinstance(put, PutArrow)  # there is no other kind
    check_way(served, slot, put.arrow)
    examples = served.examples(slot)
    if examples is None:
        code = served.actions.arrows(slot).get(put.arrow, served.actions.still(slot))
        return generate.follow(served.actions.vector(slot, code).expand(steps, model.factors, -1))
    inferred = generate.infer(model, torch.from_numpy(asked.frames), 1, steps)
    return generate.go(slot, put.arrow, examples, inferred)


def _by_shape(
    items: Sequence[ItemT], key: Callable[[ItemT], Hashable], together: Callable[[Sequence[ItemT]], list[ResultT]]
) -> list[ResultT]:
    """`together` of the items with equal keys; results in the items' order."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        groups[key(item)].append(number)
    found: dict[int, ResultT] = {}
    for group in groups.values():
        found |= dict(zip(group, together([items[number] for number in group]), strict=True))
    return [found[number] for number in range(len(items))]


def _even(rows: Sequence[Sequence[float]]) -> bool:
    return len({len(row) for row in rows}) == 1


def _device(model: Flam) -> torch.device:
    return next(model.parameters()).device

"""What each slot has learnt to do: the codes of a discrete latent action, or the clusters of a continuous one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flam_core.errors import DataError, SettingsError
from flam_core.learning.meters import ACTIVE_VARIANCE
from flam_core.model import Flam
from flam_core.model.latent_action import VQLatent
from flam_core.model.places import centres
from flam_core.saved_model import model_folder
from flam_core.steering.directions import DIRECTIONS, Examples
from flam_core.steering.scene import check_own_actions

ACTIONS_FILE = "actions.json"
"""Beside `model.safetensors` in a model's folder."""
_FORMAT = 1
_BATCH = 16
_POINTS = 1500
"""Transitions that clusters are told apart by: the silhouette looks at every pair."""
_STILL = 0.3
"""A code moves its slot if it does so by this share of the slot's fastest code or more."""
_LEAST_MOTION = 0.01
"""Share of the frame's side; less than this is no movement."""
_SAME = 1e-3
"""Distance up to which a latent action is a code: a code's vector has length 1, and rounding is far less."""
_EXAMPLES = 40
"""Transitions of a slot that are kept for each direction, and for stillness."""


@dataclass(frozen=True, eq=False)
class DiscoveredActions:
    """The codes of each slot, those in most use first. A slot's codes are counted from 0.

    vectors: a slot's codes as latent actions, float32 [N_k, A]. usage: the share of the slot's transitions that each
    code has, float32 [N_k]. motion: how far what the slot reads moves on average, (dx, dy) float32 [N_k, 2],
    in shares of the frame's side, x to the right and y down; zero for a code that is never used. entity: the number of
    the ground-truth entity that each slot is matched with, None where none is known. consistency: how much alike the
    moves of a code are, float32 [N_k]: the length of their mean over their root mean square. examples: transitions of
    each slot, for `directed`. discrete: codes are those of a codebook, which may have more than are kept here.
    """

    vectors: tuple[Tensor, ...]
    usage: tuple[Tensor, ...]
    motion: tuple[Tensor, ...]
    entity: tuple[int | None, ...]
    consistency: tuple[Tensor, ...] = ()
    examples: tuple[Examples, ...] = ()
    discrete: bool = False

    @property
    def slots(self) -> int:
        """K."""
        return len(self.vectors)

    def arrows(self, slot: int) -> dict[str, int]:
        """The codes that move a slot "up", "right", "down", "left", and that leave it "still", as far as it has any.

        By their mean moves, so it is right where codes mean the same everywhere (`consistency` near 1). Where they do
        not, as of most continuous latent actions, `directions.directed` finds the one for where the slot stands.
        Raises SettingsError for a slot that there is not.
        """
        motion, usage = self.motion[self.check_slot(slot)].numpy(), self.usage[slot].numpy()
        speed = np.hypot(motion[:, 0], motion[:, 1])
        least = max(_LEAST_MOTION, _STILL * float(speed.max(initial=0.0)))
        found: dict[str, int] = {}
        for name, direction in DIRECTIONS.items():
            if name == "still":
                continue
            along = motion @ np.asarray(direction, dtype=np.float32)
            # Nearer to this direction than to a neighbour's; the one that goes farthest, of equals the most used.
            fits = (speed >= least) & (along > 0.75 * speed)
            if fits.any():
                found[name] = int(np.where(fits, along, -np.inf).argmax())
        still = (speed < least) & (usage > 0)
        if still.any():
            found["still"] = int(np.where(still, usage, -1.0).argmax())
        return found

    def still(self, slot: int) -> int:
        """The code that moves a slot least: "still", if it has such a one. Raises SettingsError as `arrows` does."""
        found = self.arrows(slot)
        used = self.usage[slot] > 0
        speed = self.motion[slot].norm(dim=-1).where(used, torch.inf)
        return found.get("still", int(speed.argmin()))

    def vector(self, slot: int, code: int) -> Tensor:
        """The latent action float32 [A] of a slot's code. Raises SettingsError for a slot or code that there is not."""
        codes = len(self.vectors[self.check_slot(slot)])
        if not 0 <= code < codes:
            raise SettingsError(f"slot {slot} has no code {code}", fix=f"Its codes are 0 to {codes - 1}.")
        return self.vectors[slot][code]

    def check_slot(self, slot: int) -> int:
        """The slot itself. Raises SettingsError if there is no such slot."""
        if not 0 <= slot < self.slots:
            raise SettingsError(
                f"no slot {slot} is among the discovered actions", fix=f"They are of slots 0 to {self.slots - 1}."
            )
        return slot

    def check_model(self, model: Flam, address: str) -> None:
        """Raises DataError if they are not of such a model as lies at `address`: of other slots or of another width."""
        found = [vectors.shape[1] for vectors in self.vectors]
        factors, width = model.factors, model.dynamics.config.action_dim
        if found != [width] * factors:
            raise DataError(
                f"the {ACTIONS_FILE} beside {address} is of another model: of {len(found)} slots with latent actions "
                f"of {'/'.join(map(str, sorted(set(found)))) or 0} numbers, and the model has {factors} with {width}",
                fix=_ANEW,
            )

    def other(self, slot: int) -> float:
        """The share of a slot's transitions that have a code which is not kept. Raises SettingsError as `arrows`."""
        return max(0.0, 1.0 - float(self.usage[self.check_slot(slot)].sum())) if self.discrete else 0.0

    def nearest(self, actions: Tensor) -> Tensor:
        """Which code of its slot each latent action is nearest to: int64 [..., K] of float32 [..., K, A].

        -1 for a discrete one that is none of the codes: the nearest would be another one's number.
        """
        found = []
        for k in range(self.slots):
            own, exact = actions[..., k, :].float(), "donot_use_mm_for_euclid_dist"
            distance, code = torch.cdist(own, self.vectors[k], compute_mode=exact).min(dim=-1)
            found.append(code.where(distance <= _SAME, -1) if self.discrete else code)
        return torch.stack(found, dim=-1)

    def numbers(self, actions: Tensor) -> list[list[int | None]]:
        """The same of actions [T, K, A] as lists, with None for -1."""
        return [[None if code < 0 else code for code in row] for row in self.nearest(actions).tolist()]


@torch.no_grad()
def discover_actions(
    model: Flam, frames_u8: Tensor, *, seed: int = 0, most: int = 9, entities: Mapping[int, int] | None = None
) -> DiscoveredActions:
    """What the slots of a model do in clips uint8 [N, T, H, W, 3], T >= 2.

    A discrete latent action has its codes, those that a slot uses first. A continuous one is clustered slot by slot
    (k-means; the number of clusters, up to `most`, by the silhouette). entities: of each slot, where known. Raises
    SettingsError for a model without latent actions of its own, DataError if there is no transition.
    """
    check_own_actions(model)
    if frames_u8.ndim != 5 or frames_u8.shape[1] < 2 or not len(frames_u8):
        raise DataError(f"clips {list(frames_u8.shape)} hold no transition", fix="Give clips of 2 frames or more.")
    actions, codes, places, moves = _observe(model, frames_u8)
    vectors, usage, motion, consistency = [], [], [], []
    for k in range(actions.shape[1]):
        if codes is None:
            centres, label = _clusters(actions[:, k], most, seed)
        else:
            centres, label = _codes(model.dynamics.latent, codes[:, k], most)
        share = np.bincount(label[label >= 0], minlength=len(centres)) / len(label)
        order = np.argsort(-share, kind="stable")
        of_codes = [moves[label == code, k] if share[code] else np.zeros((1, 2)) for code in order]
        mean = np.stack([of_code.mean(axis=0) for of_code in of_codes])
        rms = np.sqrt([np.square(of_code).sum(axis=1).mean() for of_code in of_codes])
        vectors.append(torch.from_numpy(centres[order].astype(np.float32)))
        usage.append(torch.from_numpy(share[order].astype(np.float32)))
        motion.append(torch.from_numpy(mean.astype(np.float32)))
        alike = np.hypot(*mean.T) / np.maximum(rms, 1e-6)
        consistency.append(torch.from_numpy(alike.astype(np.float32)))
    entity = tuple((entities or {}).get(k) for k in range(len(vectors)))
    examples = tuple(_examples(actions[:, k], places[:, k], moves[:, k], seed) for k in range(len(vectors)))
    return DiscoveredActions(
        tuple(vectors), tuple(usage), tuple(motion), entity, tuple(consistency), examples, codes is not None
    )


def save_actions(actions: DiscoveredActions, folder: Path) -> Path:
    """Write `actions.json` into a model's folder; its path. Numbers come back bit for bit."""
    slots = []
    for k in range(actions.slots):
        tensors = {name: getattr(actions, name)[k] for name in _FIELDS}
        tensors |= {name: getattr(actions.examples[k], name) for name in _EXAMPLE_FIELDS}
        slots.append({name: values.tolist() for name, values in tensors.items()} | {"entity": actions.entity[k]})
    path = folder / ACTIONS_FILE
    path.write_text(json.dumps({"format": _FORMAT, "discrete": actions.discrete, "slots": slots}) + "\n")
    return path


def load_actions(address: str | Path) -> DiscoveredActions | None:
    """The discovered actions of a model, whose address is as for `flam_core.load`; None if it has none.

    Raises DataError if its file is not what `save_actions` wrote.
    """
    path = model_folder(address) / ACTIONS_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise DataError(f"{path} is of format {content['format']}, and this flam reads {_FORMAT}", fix=_ANEW)
        slots, discrete = content["slots"], content.get("discrete", False)  # files of before it was kept have none
        columns = {name: tuple(_tensor(slot[name]) for slot in slots) for name in (*_FIELDS, *_EXAMPLE_FIELDS)}
        entity = tuple(None if slot["entity"] is None else int(slot["entity"]) for slot in slots)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no discovered actions: {error}", fix=_ANEW) from error
    vectors, usage, motion, consistency = (columns[name] for name in _FIELDS)
    examples = tuple(Examples(*one) for one in zip(*(columns[name] for name in _EXAMPLE_FIELDS), strict=True))
    for v, u, m, c, e in zip(vectors, usage, motion, consistency, examples, strict=True):
        codes, known = len(v), len(e.actions)
        shapes = (codes,), (codes, 2), (codes,), (known, 2), (known, 2), (known, v.shape[-1])
        if v.ndim != 2 or not codes or shapes != tuple(tuple(x.shape) for x in (u, m, c, e.places, e.moves, e.actions)):
            raise DataError(f"{path} does not give each code its vector, usage and motion", fix=_ANEW)
    return DiscoveredActions(vectors, usage, motion, entity, consistency, examples, discrete is True)


_FIELDS = ("vectors", "usage", "motion", "consistency")
_EXAMPLE_FIELDS = ("places", "moves", "actions")
_ANEW = "Delete it, and give --data to find them anew."


def _observe(model: Flam, frames_u8: Tensor) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """Latent actions [R, K, A], their codes [R, K] (VQ), and places and moves of slots, both [R, K, 2], of all R
    transitions. Without slots, places and moves are zero."""
    device = next(model.parameters()).device
    actions, codes, places, moves = [], [], [], []
    for part in frames_u8.split(_BATCH):
        slots, _, weights = model.look(model.encode(part.to(device)))
        found = model.infer(slots)
        actions.append(found.mean.float().flatten(0, 1).cpu())
        if found.codes is not None:
            codes.append(found.codes.flatten(0, 1).cpu())
        at = torch.zeros(*part.shape[:2], found.mean.shape[2], 2) if weights is None else centres(weights).cpu()
        places.append(at[:, :-1].flatten(0, 1))
        moves.append(at.diff(dim=1).flatten(0, 1))
    whole = [torch.cat(parts).numpy() for parts in (actions, places, moves)]
    return whole[0], torch.cat(codes).numpy() if codes else None, whole[1], whole[2]


def _examples(actions: np.ndarray, places: np.ndarray, moves: np.ndarray, seed: int) -> Examples:
    """Up to _EXAMPLES transitions of a slot for each direction, of those that are at hand."""
    speed = np.hypot(*moves.T)
    least = max(_LEAST_MOTION, _STILL * float(speed.max(initial=0.0)))
    order = np.random.default_rng(seed).permutation(len(moves))
    going = [(speed >= least) & (moves @ np.array(d) > 0.75 * speed) for d in DIRECTIONS.values() if any(d)]
    kept = [order[kind[order]][:_EXAMPLES] for kind in (*going, speed < least)]
    chosen = np.concatenate(kept) if any(map(len, kept)) else order[:_EXAMPLES]
    return Examples(*(torch.from_numpy(x[chosen].astype(np.float32)) for x in (places, moves, actions)))


def _codes(latent: torch.nn.Module, codes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [n, A] of up to `most` codes, those of a slot's transitions [R] first, and which of them each has (-1:
    one that was left out)."""
    assert isinstance(latent, VQLatent)
    counts = np.bincount(codes, minlength=latent.codebook.num_embeddings)
    kept = np.argsort(-counts, kind="stable")[:most]
    place = np.full(len(counts), -1)
    place[kept] = np.arange(len(kept))
    return latent.vectors(torch.from_numpy(kept)).cpu().numpy(), place[codes]


def _clusters(actions: np.ndarray, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [n, A] of the clusters of actions [R, A], and which of them each is in."""
    from sklearn.cluster import KMeans  # a second, which nothing else that steers need wait for
    from sklearn.metrics import silhouette_score

    one = actions.mean(axis=0, keepdims=True), np.zeros(len(actions), dtype=np.int64)
    rng = np.random.default_rng(seed)
    few = actions[rng.permutation(len(actions))[:_POINTS]].astype(np.float64)
    if (few.var(axis=0) <= ACTIVE_VARIANCE).all() or len(few) < 4:
        return one  # a slot that does nothing
    best, best_score = None, -1.0
    for count in range(2, min(most, len(np.unique(few, axis=0)), len(few) - 1) + 1):
        means = KMeans(count, n_init=2, random_state=seed).fit(few)  # pyright: ignore[reportArgumentType]
        score = float(silhouette_score(few, means.labels_))
        if score > best_score:
            best, best_score = means, score
    if best is None:
        return one
    return np.asarray(best.cluster_centers_), np.asarray(best.predict(actions.astype(np.float64)))


def _tensor(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)

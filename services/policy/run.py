"""Runs the policy protocol: data, FLAM, latent actions and policies as Ray tasks, each done once and kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

import flam_core
from flam_core.data.ingest import ingest_world
from flam_core.errors import DataError
from flam_core.evaluation.held_out import held_out_clips
from flam_core.policy import (
    Demonstrations,
    clone,
    expert_player,
    fit_decoder,
    infer_latents,
    network_player,
    play_games,
    random_player,
    top_actions,
)
from flam_core.saved_model import WEIGHTS, save_model
from services.policy.evidence import TRAINED, model_used
from services.policy.plan import CLONED, Cell, PolicySettings, data_name, flam_config, flam_place, world_of
from services.storage import resolve
from services.study.tasks import RETRIES, Results, as_they_finish, ray_for, refuse_broken, source_of, train_here

_ALL = 1 << 40
_OBJECT_STORE = 256 << 20
_HEADROOM = 1.3
_MOST_HELD_OUT = 1000


def run_policies(
    cells: Sequence[Cell], settings: PolicySettings, say: Callable[[str], None] = print
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell with its result (`return`, `returns`, `seconds`, ...), as they finish; those done before come first.

    Results are kept in the folder and, beside the table, in `settings.out`: a cell whose result is in either is not
    done again. Raises EnvironmentFault if no node can run a task, and EnvironmentFault, DataError or TrainingFailed for
    what goes wrong in a cell.
    """
    folder = Path(settings.folder).absolute()
    results = Results(folder, Path(settings.out))
    waiting = []
    for cell in cells:
        if (result := results.find(cell.name)) is not None:
            yield cell, result
        else:
            waiting.append(cell)
    if not waiting:
        return
    say(f"{len(cells) - len(waiting)} of {len(cells)} cells are done already, {len(waiting)} to go")
    cpus, gpus = settings.threads, settings.gpus
    with ray_for(settings.address, settings.tasks * cpus, _handed_on(settings), cpus=cpus, gpus=gpus):
        yield from _run(waiting, settings, folder, results, say)


def _handed_on(settings: PolicySettings) -> int:
    """Bytes for what tasks hand on: all frames of all environments."""
    sizes = {env: world_of(settings, env).frame_size for env in settings.envs}
    frames = sum(settings.episodes_of(env) * settings.frames_of(env) * 3 * size**2 for env, size in sizes.items())
    return int(_HEADROOM * frames) + _OBJECT_STORE


def _run(
    waiting: Sequence[Cell], settings: PolicySettings, folder: Path, results: Results, say: Callable[[str], None]
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    remote: Any = ray.remote(num_cpus=settings.threads, num_gpus=settings.gpus, max_retries=RETRIES)
    light: Any = ray.remote(num_cpus=1, max_retries=RETRIES)
    make, read = light(make_data), light(read_data)
    train, infer, measure = remote(train_flam), remote(infer_actions), remote(measure_cell)
    given = settings.model
    if given is not None and Path(given).exists():
        given = str(Path(given).absolute())  # tasks may be started in another folder
    data: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    models: dict[tuple[str, int], Any] = {}
    latents: dict[tuple[str, int], Any] = {}
    running: dict[Any, Cell] = {}
    for cell in waiting:
        env, key = cell.env, (cell.env, cell.seed)
        if cell.method in CLONED and env not in data:
            data[env] = make.remote(settings, folder, env)
            seen[env] = read.remote(settings, env, data[env])
        if cell.method == "flam" and key not in latents:
            model = models[key] = given or train.remote(settings, env, cell.seed, data[env])
            latents[key] = infer.remote(settings, env, model, seen[env])
        known = seen[env] if cell.method in CLONED else None
        inferred, model = (latents[key], models[key]) if cell.method == "flam" else (None, None)
        running[measure.remote(settings, folder, cell, known, inferred, model)] = cell
    for cell, result, left in as_they_finish(running):
        say(f"{cell.name}: {_said(result)}; {left}")
        results.show(cell.name, result)
        yield cell, result


def _said(result: dict[str, Any]) -> str:
    labels = "" if result["label_accuracy"] is None else f", {result['label_accuracy']:.1%} of its labels are true"
    return f"return {result['return']:.2f}{labels}"


def make_data(settings: PolicySettings, folder: Path, env: str) -> str:
    """The expert data set of an environment, made if it is not there; its path. A Ray task."""
    location = resolve(folder / "data" / data_name(settings, env))
    if not Path(location.path, "manifest.json").exists():
        episodes, frames = settings.episodes_of(env), settings.frames_of(env)
        ingest_world(world_of(settings, env), location.fs, location.path, episodes=episodes, frames=frames)
    return location.path


def read_data(settings: PolicySettings, env: str, data: str) -> tuple[Demonstrations, Demonstrations]:
    """The train and the test clips of a data set, whole. A Ray task: its arrays are shared by all that read them."""
    source, choices = source_of(data), world_of(settings, env).choices
    place, left_out = source.data, source.quarantine

    def read(split: str) -> Demonstrations:
        clips = held_out_clips(
            source.manifest, place.fs, data, split, None, _ALL, quarantine=left_out, on_broken=refuse_broken
        )
        return Demonstrations.of(clips, choices)

    return read("train"), read("test")


def train_flam(settings: PolicySettings, env: str, seed: int, data: str) -> str:
    """Both stages on an expert data set, of which it sees the frames alone; the model's folder. A Ray task."""
    config, place = flam_config(settings, env, seed), flam_place(settings, env, seed)
    if not (place / WEIGHTS).exists():
        begun = time.monotonic()
        steps = config.tokenizer_stage.steps + config.flam_stage.steps
        trainer = train_here(config, data, until=steps, name=place.name, threads=settings.threads, gpus=settings.gpus)
        part = place.with_name(f".{place.name}")
        save_model(trainer.model.cpu(), part, f"# {place.name}\n\nFLAM of the policy protocol.\n")
        (part / TRAINED).write_text(json.dumps({"seconds": time.monotonic() - begun}) + "\n")
        part.replace(place)
    return str(place)


def infer_actions(
    settings: PolicySettings, env: str, model: str, data: tuple[Demonstrations, Demonstrations]
) -> np.ndarray:
    """Latent actions float32 [M, K, A] of all train transitions, with their neighbours'. A Ray task."""
    torch.set_num_threads(settings.threads)
    return infer_latents(flam_core.load(model).to(_device(settings)), data[0].clips, window=settings.window_of(env))


def measure_cell(
    settings: PolicySettings,
    folder: Path,
    cell: Cell,
    data: tuple[Demonstrations, Demonstrations] | None,
    latents: np.ndarray | None,
    model: str | None,
) -> dict[str, Any]:
    """Label, clone and play; the result, which is kept in the folder. A Ray task. model: that gave the latents."""
    begun = time.monotonic()
    torch.set_num_threads(settings.threads)
    world = world_of(settings, cell.env)
    result: dict[str, Any] = {
        **{"env": cell.env, "method": cell.method, "labels": cell.labels, "seed": cell.seed},
        **dict.fromkeys(("label_accuracy", "policy_accuracy", "slot", "slot_accuracy", "transitions")),
        "model": None if model is None else model_used(model),
    }
    if data is None:
        player = expert_player if cell.method == "expert" else random_player(world.choices, cell.seed)
    else:
        train, test = data
        held_out, chosen, targets, found = _labelled(settings, cell, train, world.choices, latents)
        policy = clone(train, chosen, targets, settings.policy, cell.seed, _device(settings), held_out)
        right = top_actions(policy, test, np.arange(len(test.actions))) == test.actions
        result |= {**found, "policy_accuracy": float(right.mean()), "transitions": len(train.actions)}
        player = network_player(policy, cell.seed)
    learnt = time.monotonic()
    steps, stack = settings.play_steps_of(cell.env), settings.policy.stack
    returns = play_games(world, player, games=settings.games, steps=steps, seed=cell.seed, stack=stack)
    result |= {"return": float(returns.mean()), "returns": returns.tolist()}
    result |= {"learning_seconds": learnt - begun, "seconds": time.monotonic() - begun}
    Results(folder, Path(settings.out)).keep(cell.name, result)
    return result


def _labelled(
    settings: PolicySettings, cell: Cell, train: Demonstrations, choices: int, latents: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Which transitions int64 [m] decide when to stop and which [n] are learnt from, the probability of each action
    float32 [n, choices] there, and what is to be told of that.

    Labels of fewer are among those of more, and the same for all methods.
    """
    truth = np.eye(choices, dtype=np.float32)[train.actions]
    order = np.random.default_rng((cell.seed, 4)).permutation(len(truth))
    if cell.method == "bc-all":
        held_out, learnt = _kept_back(order)
        return held_out, learnt, truth[learnt], {}
    if cell.labels is None or cell.labels > len(order):
        raise DataError(
            f"{cell.labels} labels asked for, but {cell.env} has {len(order)} transitions to learn from",
            fix="Record more episodes (--episodes, --frames) or ask for fewer labels.",
        )
    known, unknown = np.split(order, [cell.labels])
    held_out, learnt = _kept_back(known)
    if latents is None:
        return held_out, learnt, truth[learnt], {}
    decoder = fit_decoder(latents[known], train.actions[known], choices, settings.policy, cell.seed)
    guessed = decoder.probabilities(latents[unknown])
    best = guessed.argmax(axis=1)
    accuracy = float((best == train.actions[unknown]).mean()) if len(unknown) else None
    if settings.policy.pseudo == "hard":
        guessed = np.eye(choices, dtype=np.float32)[best]
    found = {"label_accuracy": accuracy, "slot": decoder.slot, "slot_accuracy": list(decoder.accuracy)}
    return held_out, np.concatenate([learnt, unknown]), np.concatenate([truth[learnt], guessed]), found


def _kept_back(labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of labelled transitions in random order those that decide when to stop, and the rest."""
    count = min(_MOST_HELD_OUT, len(labelled) // 10)
    return labelled[:count], labelled[count:]


def _device(settings: PolicySettings) -> torch.device:
    return torch.device("cuda" if settings.gpus else "cpu")

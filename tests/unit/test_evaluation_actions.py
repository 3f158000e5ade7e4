"""The action probe against models of which it is known what their latent actions tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flam_core.config_evaluation import EvaluationConfig
from flam_core.errors import DataError, TrainingFailed
from flam_core.evaluation.action_probe import ActionProbe, Transitions, probe_actions, visible_actions
from flam_core.evaluation.context import Context
from flam_core.evaluation.correspondence import ACTION_PROBE
from flam_core.evaluation.stats import Bootstrap
from tests.evaluation_fixture import MOVES, Puppets, puppet_clips, stub

KINDS = 4


def made(
    n: int, seed: int, knows: dict[int, int], latents: int = 3, entities: int = 3, kinds: int = KINDS
) -> Transitions:
    """Latent action m tells what entity knows[m] was told (and is noise elsewhere); the state is noise."""
    rng = np.random.default_rng(seed)
    told = rng.integers(kinds, size=(n, entities))
    latent = 0.1 * rng.normal(size=(n, latents, 6))
    for m, entity in knows.items():
        latent[:, m] += np.eye(kinds, 6)[told[:, entity]]
    state = rng.normal(size=(n, latents, 16))
    return Transitions(latent, state, told[..., None].astype(np.float32), None)


def probe(knows: dict[int, int], n: int = 800) -> ActionProbe:
    return probe_actions(made(n, 1, knows), made(n, 2, knows), Bootstrap(np.arange(n) // 8, seed=0))


def test_one_latent_action_per_entity() -> None:
    found = probe({0: 2, 1: 0, 2: 1})
    means = {key: estimate.mean for key, estimate in found.estimates.items()}
    assert found.matching == ((1, 0), (2, 1), (0, 2))
    assert means["action_probe/accuracy"] == 1.0
    assert means["action_probe/accuracy@2"] == 1.0
    for key in ("state_only", "others"):
        assert means[f"action_probe/{key}"] == pytest.approx(1 / KINDS, abs=0.04)
    assert means["action_probe/gain"] == pytest.approx(1 - means["action_probe/state_only"])
    assert means["action_probe/others_gain"] == pytest.approx(0, abs=0.04)
    assert found.estimates["action_probe/gain"].n == 100
    assert "action_probe/visible_accuracy" not in means  # without positions nobody knows what can be seen


def test_latent_actions_that_tell_of_another_entity_are_found_out() -> None:
    both = made(800, 1, {0: 0, 1: 1}, latents=2, entities=2), made(800, 2, {0: 0, 1: 1}, latents=2, entities=2)
    coupled = [replace(t, latent=np.concatenate([t.latent, t.latent[:, ::-1]], axis=2)) for t in both]
    found = probe_actions(*coupled, Bootstrap(range(800), seed=0)).estimates
    assert found["action_probe/accuracy"].mean == 1.0
    assert found["action_probe/others"].mean == 1.0
    assert found["action_probe/others_gain"].mean == pytest.approx(1 - 1 / KINDS, abs=0.05)


def test_one_latent_action_that_tells_of_one_other_entity_is_not_lost_in_the_mean() -> None:
    both = [made(800, seed, {0: 0, 1: 1, 2: 2}) for seed in (1, 2)]
    coupled = [
        replace(t, latent=t.latent + np.stack([t.latent[:, 1]] + [0 * t.latent[:, 0]] * 2, axis=1)) for t in both
    ]
    found = probe_actions(*coupled, Bootstrap(range(800), seed=0)).estimates
    assert found["action_probe/others_gain_max"].mean > 3 * found["action_probe/others_gain"].mean > 0


def test_what_the_state_tells_already_is_no_gain() -> None:
    """The action can be read off the state as well; and the state's probe is no wider than the latent action's."""
    train, test = made(800, 1, {0: 0}, latents=1, entities=1), made(800, 2, {0: 0}, latents=1, entities=1)
    tells = [replace(t, state=np.concatenate([10 * t.latent, t.state], axis=2)) for t in (train, test)]
    found = probe_actions(*tells, Bootstrap(range(800), seed=0)).estimates
    assert found["action_probe/state_only"].mean == 1.0
    assert found["action_probe/gain"].mean == 0.0
    assert "action_probe/others" not in found
    hidden = [replace(t, state=np.concatenate([0.1 * t.latent, t.state], axis=2)) for t in (train, test)]
    found = probe_actions(*hidden, Bootstrap(range(800), seed=0)).estimates
    assert found["action_probe/state_only"].mean < 0.6  # not among the leading components


def test_fewer_latent_actions_than_entities() -> None:
    train, test = (made(600, seed, {0: 1}, latents=1) for seed in (1, 2))
    found = probe_actions(train, test, Bootstrap(range(600), seed=0))
    assert found.matching == ((0, 1),)
    assert found.estimates["action_probe/accuracy"].mean == 1.0
    assert found.estimates["action_probe/others"].mean == pytest.approx(1 / KINDS, abs=0.05)


def test_values_are_scored_by_r2() -> None:
    def values(seed: int) -> Transitions:
        rng = np.random.default_rng(seed)
        told = rng.normal(size=(400, 2, 2)).astype(np.float32)
        latent = np.concatenate([told, rng.normal(size=(400, 2, 3))], axis=2)
        latent[:, 1, :2] += rng.normal(size=(400, 2))  # as much noise as signal: half is explained
        return Transitions(latent, rng.normal(size=(400, 1, 8)), told, None)

    found = probe_actions(values(1), values(2), Bootstrap(range(400), seed=0)).estimates
    assert found["action_probe/r2@0"].mean == pytest.approx(1.0, abs=0.01)
    assert found["action_probe/r2@1"].mean == pytest.approx(0.5, abs=0.08)
    assert found["action_probe/state_only"].mean == pytest.approx(0.0, abs=0.02)
    assert "action_probe/accuracy" not in found


def test_unknown_actions_are_left_out() -> None:
    train, test = made(400, 1, {0: 0, 1: 1}), made(400, 2, {0: 0, 1: 1})
    for split in (train, test):
        split.told[:, 2] = np.nan
        away = np.random.default_rng(3).random(400) < 0.5
        split.told[away, 1] = np.nan
        split.latent[away, 1] = 1e3
    found = probe_actions(train, test, Bootstrap(range(400), seed=0))
    assert found.matching == ((0, 0), (1, 1))
    assert found.estimates["action_probe/accuracy"].mean == 1.0
    train.told[:] = 1.0
    with pytest.raises(DataError, match="none of 3 entities"):
        probe_actions(train, test, Bootstrap(range(400), seed=0))


def test_numbers_that_make_no_sense_are_refused() -> None:
    train, test = made(40, 1, {}), made(40, 2, {}, entities=2)
    with pytest.raises(DataError, match="train has actions"):
        probe_actions(train, test, Bootstrap(range(40), seed=0))
    with pytest.raises(TrainingFailed, match="not finite"):
        probe_actions(train, replace(train, latent=train.latent * np.nan), Bootstrap(range(40), seed=0))


def test_visible_actions() -> None:
    """Blocked: of the class of the one action that stays, or of a class of its own where several do."""
    n = 400
    told = np.random.default_rng(0).integers(5, size=(n, 1, 1)).astype(np.float32)
    step = MOVES[told[:, 0, 0].astype(int)][:, None] / 8.0
    blocked = np.random.default_rng(1).random(n) < 0.3
    step[blocked] = 0
    step[:5] = np.nan
    split = Transitions(np.zeros((n, 1, 1)), np.zeros((n, 1, 1)), told, step)
    seen = visible_actions(split, split, 0)
    assert np.isnan(seen[:5]).all()
    np.testing.assert_array_equal(seen[5:], np.where(blocked, 0, told[:, 0, 0])[5:])
    turning = told.copy()
    turning[told == 4] = 0  # now the one that is told 0 or 5 stays
    turning[::2][told[::2] == 0] = 5
    step = np.where(np.isin(turning[:, 0], (0, 5))[..., None], 0, step)
    seen = visible_actions(replace(split, told=turning, step=step), replace(split, told=turning, step=step), 0)
    expected = np.where(blocked & ~np.isin(turning[:, 0, 0], (0, 5)), -1, turning[:, 0, 0])
    np.testing.assert_array_equal(seen[5:], expected[5:])


def test_puppets_show_all_that_can_be_seen_of_what_they_are_told() -> None:
    config = EvaluationConfig(horizon=5, probe_clips=60)
    context = Context(stub(Puppets), [], puppet_clips(60, seed=1), puppet_clips(60, seed=2), config, 0)
    found = ACTION_PROBE.run(context)
    assert found.estimates["action_probe/visible_accuracy"].mean == 1.0
    by_state = found.estimates["action_probe/visible_state_only"].mean
    assert 0.2 < by_state < 0.9  # standing still, which is what is seen most often
    assert found.estimates["action_probe/visible_gain"].mean == pytest.approx(1 - by_state)
    told, shown, hits = [], [], 0
    for clip in puppet_clips(60, seed=2):
        assert clip.positions is not None
        assert clip.actions is not None
        told += list(clip.actions[:-1, :, 0].reshape(-1))
        shown += list(np.abs(np.diff(clip.positions, axis=0)).sum(axis=2).reshape(-1) > 0)
    hits = sum(moved or action == 0 for action, moved in zip(told, shown, strict=True))
    assert found.estimates["action_probe/accuracy"].mean == pytest.approx(hits / len(told), abs=0.03)
    assert found.estimates["action_probe/accuracy"].n == 30
    assert found.estimates["action_probe/others_gain"].mean == pytest.approx(0, abs=0.06)

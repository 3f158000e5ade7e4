"""Sweeps without a cluster: the space, the study and its restarts, ASHA told again, and what the numbers say."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import tyro
from PIL import Image
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from flam_core.errors import DataError, SettingsError
from flam_core.recipes import get_recipe
from services.storage import resolve
from services.sweep.actor import SCORE, STEP
from services.sweep.analysis import best, best_trial, differences, next_steps, pareto, summaries, wanted_factors
from services.sweep.halving import Halving
from services.sweep.report import _PICTURES, page
from services.sweep.search import StudySearch, objectives, open_study
from services.sweep.settings import SweepSettings
from services.sweep.space import Point, Space, tokenizers
from services.sweep.trials import Look, Record, Trial, read_record, write_record
from tests.sweep_fixture import OBJECTIVES, collapsed, sweep, trial

BASE = get_recipe("tiny")
GOALS = objectives(truth=True, horizon=10)


def parsed(*words: str) -> Space:
    return tyro.cli(Space, args=list(words), use_underscores=True)


def test_values_are_given_with_commas() -> None:
    space = parsed("--factors", "2,4,8", "--codebook", "0,4", "--beta", "2e-4,1e-2", "--fsq", "8x8x8,5x5x5x5")
    assert space == Space((2, 4, 8), (0, 4), (), (2e-4, 1e-2), ((8, 8, 8), (5, 5, 5, 5)))


def test_every_point_is_there_once() -> None:
    points = Space((2, 4), (0, 8), (), (2e-4, 1e-2)).points(BASE)
    # Discrete latent actions have no KL, so that beta makes no points of them.
    assert [point.name for point in points] == [
        "k2-gaussian-w32-b0.0002-fsq4x4x4x4x4",
        "k2-gaussian-w32-b0.01-fsq4x4x4x4x4",
        "k2-vq8-w32-b0.0002-fsq4x4x4x4x4",
        "k4-gaussian-w64-b0.0002-fsq4x4x4x4x4",
        "k4-gaussian-w64-b0.01-fsq4x4x4x4x4",
        "k4-vq8-w64-b0.0002-fsq4x4x4x4x4",
    ]


def test_a_point_is_a_config() -> None:
    config = Point(4, 8, 64, 1e-3, (8, 8, 8)).config(BASE, seed=5)
    assert (config.model.factors, config.model.latent, config.model.codebook) == (4, "vq", 8)
    assert (config.model.latent_width, config.tokenizer.fsq_levels, config.seed) == (64, (8, 8, 8), 5)
    assert config.tokenizer_stage == BASE.tokenizer_stage
    gaussian = Point(4, 0, 64, 1e-3, (8, 8, 8)).config(BASE, seed=5)
    assert (gaussian.model.latent, gaussian.loss.beta) == ("gaussian", 1e-3)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (lambda: Space(factors=(0,)), "factors = 0"),
        (lambda: Space(factors=()), "factors = nothing"),
        (lambda: Space(codebook=(1,)), "codebook = 1"),
        (lambda: Space(beta=(-1.0,)), "beta = -1"),
        (lambda: Space(factors=(2, 2)), "has one twice"),
        (lambda: Space((3,), latent_width=(64,)).points(BASE), "point k3-.*not divisible by model.factors 3"),
        (lambda: SweepSettings(search="tpe"), "search tpe with points = 0"),
        (lambda: SweepSettings(points=3), "search grid with points = 3"),
        (lambda: SweepSettings(reduction=0.5), "reduction = 0.5"),
        (lambda: SweepSettings(seeds=0), "seeds = 0"),
    ],
)
def test_what_cannot_be_is_refused(space: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        space()
    assert caught.value.fix


def test_one_tokenizer_a_setting() -> None:
    points = Space((2, 4), (0, 8), fsq=((8, 8, 8), (4, 4))).points(BASE)
    found = dict(tokenizers(points, BASE))
    assert list(found) == [(8, 8, 8), (4, 4)]
    assert all(config.flam_stage.steps == 0 for config in found.values())


def record(name: str, psnr: float = 30.0, **changes: Any) -> Record:
    looks = tuple(Look(step, {GOALS[0].metric: psnr * step / 1000}) for step in (400, 800))
    metrics = {goal.metric: 1.0 for goal in GOALS} | {GOALS[0].metric: psnr}
    values = {"run_id": "tiny-1", "stopped_by": None, "metrics": metrics, "seconds": 60.0, "steps": 1000, **changes}
    return Record(name=name, looks=looks, **values)


def test_records_come_back(tmp_path: Path) -> None:
    folder = resolve(tmp_path)
    one = Trial(Point(4, 0, 64, 1e-3, (8, 8)), 2)
    assert read_record(folder, one) is None
    kept = record(one.name, stopped_by="failed: the loss is nan")
    write_record(folder, kept)
    assert read_record(folder, one) == kept
    assert kept.failed
    (tmp_path / "trials" / f"{one.name}.json").write_text("{}")
    with pytest.raises(DataError, match="is not the record of a trial"):
        read_record(folder, one)


class Driver:
    """A driver as Tune is one, that may be killed: what outlives it is the study's storage and the records."""

    def __init__(self, storage: str, settings: SweepSettings, space: Space, records: dict[str, Record]) -> None:
        self.records = records
        self.study = open_study(storage, "sweep-x", settings, space, BASE, GOALS)
        self.search = StudySearch(
            self.study, settings, space, BASE, GOALS, lambda one: records.get(one.name), self._make, self._write
        )
        self._count = 0

    def _make(self, one: Trial) -> dict[str, Any]:
        return {"trial": one.name}

    def _write(self, _tune_id: str, one: Trial) -> Record | None:
        self.records[one.name] = record(one.name)
        return self.records[one.name]

    def next(self) -> tuple[str, str]:
        """Tune's name of the next trial and ours; ours is "" at the end."""
        self._count += 1
        name = f"t{self._count}"
        config = self.search.suggest(name)
        return name, "" if config == Searcher.FINISHED else config["trial"]


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/optuna.db"


def test_a_grid_is_given_out_once_however_often_its_driver_is_killed(storage: str) -> None:
    settings, space = SweepSettings(seeds=2), Space((2, 4), (0, 8))
    records: dict[str, Record] = {}
    trained = []
    for ended in (1, 3):  # a driver is killed after so many trials, with two more under way
        driver = Driver(storage, settings, space, records)
        under_way = [driver.next() for _ in range(2)]
        for _ in range(ended):
            name, one = under_way.pop(0)
            driver.search.on_trial_complete(name, {})
            trained.append(one)
            under_way.append(driver.next())
    driver = Driver(storage, settings, space, records)
    while (found := driver.next())[1]:
        driver.search.on_trial_complete(found[0], {})
        trained.append(found[1])
    expected = {Trial(point, seed).name for point in space.points(BASE) for seed in (0, 1)}
    assert sorted(trained) == sorted(expected)
    assert set(driver.search.records) == expected
    states = [one.state for one in driver.study.get_trials()]
    assert states == [optuna.trial.TrialState.COMPLETE] * 4


def test_tpe_asks_for_so_many_points_and_no_more(storage: str) -> None:
    settings, space = SweepSettings(search="tpe", points=5), Space((2, 3, 4, 6, 8), (0, 4, 8, 16))
    records: dict[str, Record] = {}
    driver = Driver(storage, settings, space, records)
    for _ in range(2):
        driver.search.on_trial_complete(driver.next()[0], {})
    driver.next()  # under way when its driver is killed
    driver = Driver(storage, settings, space, records)
    while (found := driver.next())[1]:
        driver.search.on_trial_complete(found[0], {})
    complete = driver.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert len(complete) == 5
    assert len(records) <= 5  # a point that is asked for twice is trained once


@pytest.mark.parametrize("written", [(), ("factors",)], ids=["nothing", "one setting"])
@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_a_driver_killed_within_ask_loses_no_point(storage: str, search: Any, written: tuple[str, ...]) -> None:
    settings = SweepSettings(search=search, points=0 if search == "grid" else 2)
    space = Space((2, 4), (0, 8), fsq=((8, 8, 8), (4, 4)))
    expected = 8 if search == "grid" else 2
    driver = Driver(storage, settings, space, {})
    asked = driver.study.ask()
    for name in written:
        asked.suggest_categorical(name, (2, 4))
    driver = Driver(storage, settings, space, {})
    while (found := driver.next())[1]:
        driver.search.on_trial_complete(found[0], {})
    states = [one.state for one in driver.study.get_trials()]
    assert states == [optuna.trial.TrialState.COMPLETE] * expected
    assert len(driver.records) == expected or search == "tpe"


def test_a_point_none_of_whose_trials_was_measured_has_failed(storage: str) -> None:
    driver = Driver(storage, SweepSettings(), Space((2,)), {})
    name, one = driver.next()
    driver.records[one] = record(one, stopped_by="failed: nan", metrics={})
    driver.search._write = lambda _name, _trial: driver.records[one]
    driver.search.on_trial_complete(name, {})
    assert [found.state for found in driver.study.get_trials()] == [optuna.trial.TrialState.FAIL]


def test_an_interrupted_trial_is_given_out_again(storage: str) -> None:
    driver = Driver(storage, SweepSettings(), Space((2,)), {})
    driver.search._write = lambda _name, _trial: None
    name, one = driver.next()
    driver.search.on_trial_complete(name, {})
    again = Driver(storage, SweepSettings(), Space((2,)), {})
    assert again.next()[1] == one


def test_an_address_that_is_no_storage_is_refused() -> None:
    with pytest.raises(SettingsError, match="--optuna nonsense is not a storage"):
        open_study("nonsense", "x", SweepSettings(), Space((2,)), BASE, GOALS)


def decide(asha: Halving, name: str, scores: dict[int, float]) -> list[str]:
    one: Any = SimpleNamespace(trial_id=name)
    asha.on_trial_add(None, one)  # pyright: ignore[reportArgumentType]
    return [asha.on_trial_result(None, one, {STEP: step, SCORE: score}) for step, score in scores.items()]


def test_asha_stops_a_bad_trial_at_the_first_milestone() -> None:
    asha = Halving(SweepSettings(), 1000, GOALS[0].metric, [])
    assert decide(asha, "good", {200: 20.0, 400: 30.0, 600: 31.0}) == [TrialScheduler.CONTINUE] * 3
    assert decide(asha, "bad", {200: 5.0, 400: 20.0}) == [TrialScheduler.CONTINUE, TrialScheduler.STOP]
    assert asha.stopped == {"bad"}


def test_asha_remembers_what_earlier_drivers_saw() -> None:
    known = [record("one", psnr=30.0), record("two", psnr=28.0)]
    asha = Halving(SweepSettings(), 1000, GOALS[0].metric, known)
    assert decide(asha, "bad", {400: 8.0}) == [TrialScheduler.STOP]
    assert decide(asha, "good", {400: 12.5, 800: 25.0}) == [TrialScheduler.CONTINUE] * 2


def test_no_trial_is_stopped_at_its_last_look() -> None:
    asha = Halving(replace(SweepSettings(), grace=1.0), 1000, GOALS[0].metric, [record("one", psnr=40.0)])
    assert decide(asha, "late", {1000: 1.0})[-1] == TrialScheduler.CONTINUE


def test_the_fewest_factors_that_suffice_are_named() -> None:
    found = sweep()
    assert wanted_factors(found) == (4, "no larger K is shown to be better (at most -0.00)")
    verdicts = {(one.value, one.other): one.verdict for one in differences(found, "factors")}
    assert verdicts == {(4, 2): "better", (8, 2): "better", (8, 4): "no difference that these trials show"}


def test_a_trial_that_was_stopped_is_compared_at_the_newest_common_step() -> None:
    found = sweep(trials=[trial(4, 0, 2e-4, 0), {**trial(2, 0, 2e-4, 0), "stopped_by": "asha"}])
    found["trials"][1]["looks"] = found["trials"][1]["looks"][:2]
    (one,) = differences(found, "factors")
    at_500 = [row["looks"][1]["metrics"]["rollout/psnr@10"] for row in found["trials"]]
    assert one.estimate.mean == pytest.approx(at_500[0] - at_500[1])
    assert one.verdict == "one pair says nothing of the spread"


def test_means_are_over_the_trials_that_came_to_their_end() -> None:
    by_label = {(p.label, p.settings["beta"]): p for p in summaries(sweep())}
    assert by_label["K=2 VQ-8", 2e-4].seeds == 1
    assert by_label["K=2 VQ-8", 2e-4].stopped == {"asha": 1}
    assert by_label["K=4 Gaussian", 1e-2].stopped == {"posterior-collapse": 2}
    assert by_label["K=4 Gaussian", 1e-2].estimates == {}
    top = best(list(by_label.values()), "rollout/psnr@10")
    assert top is not None
    assert top.settings["factors"] >= 4


def test_the_front_is_what_nothing_beats() -> None:
    points = summaries(sweep(trials=[trial(2, 0, 2e-4, 0), trial(4, 0, 2e-4, 0), trial(8, 0, 2e-4, 0)]))
    front = [point.settings["factors"] for point in pareto(points, OBJECTIVES)]
    worse = {**trial(8, 0, 2e-4, 0)}
    worse["metrics"] = {**worse["metrics"], "rollout/psnr@10": 1.0}
    assert 2 in front
    assert 4 in front
    beaten = summaries(sweep(trials=[trial(4, 0, 2e-4, 0), worse]))
    assert [point.settings["factors"] for point in pareto(beaten, OBJECTIVES)] == [4]


def test_the_best_trial_is_chosen_on_the_split_that_is_not_for_judging() -> None:
    found = sweep(trials=[trial(4, 0, 2e-4, 0), trial(4, 0, 2e-4, 1), collapsed(4, 0)])
    for row, val, test in zip(found["trials"], (30.0, 31.0, 99.0), (35.0, 20.0, 99.0), strict=True):
        row["looks"] = [{"step": 1000, "metrics": {"rollout/psnr@10": val}}]
        row["metrics"] = {**row["metrics"], "rollout/psnr@10": test}
    chosen = best_trial(found)
    assert chosen is not None
    assert chosen["seed"] == 1
    assert best_trial(sweep(trials=[collapsed(4, 0)])) is None


def test_the_cliff_is_named_and_what_to_try() -> None:
    said = " ".join(next_steps(sweep()))
    assert "beta 0.01 is over the cliff: all 2 trials with it ended in posterior-collapse, and beta 0.0002" in said
    assert "K = 4 suffices and K = 2 does not: narrow it down, --factors 3,4" in said
    lost = sweep(trials=[collapsed(4, 0)])
    assert "No trial came to its end" in " ".join(next_steps(lost))


def test_the_page_shows_everything_and_runs_nothing() -> None:
    found = sweep(dataset="<script>alert(1)</script>")
    pictures = {name: draw(found) for name, (_, _, draw) in _PICTURES.items()}
    shown = page(found, pictures)
    assert "<script>" not in shown
    assert "The data want 4 factors" in shown
    assert shown.count("data:image/png;base64,") == len(_PICTURES)
    assert all(Image.open(io.BytesIO(content)).width > 300 for content in pictures.values())


def test_a_sweep_in_which_all_was_lost_is_drawn_too() -> None:
    found = sweep(trials=[{**collapsed(4, 0), "looks": [], "metrics": {}}])
    pictures = {name: draw(found) for name, (_, _, draw) in _PICTURES.items()}
    assert "No trial came to its end" in page(found, pictures)

"""What a study trains: cells that fit together, at the sizes of each recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flam_core.errors import SettingsError
from flam_core.recipes import get_recipe
from flam_core.worlds import make_world
from services.study import StudySettings, ablation_cells, factoring_cells
from services.study.plan import FACTORING, world_options
from services.study.run import tokenizer_config, tokenizer_place


@pytest.mark.parametrize("recipe", ["tiny", "multigrid"])
def test_the_same_command_works_at_the_papers_sizes(recipe: str) -> None:
    settings = StudySettings(recipe=recipe)
    cells = factoring_cells(settings)
    assert len(cells) == len({cell.name for cell in cells}) == 3 * 3 * len(FACTORING)
    for agents in settings.agents:
        world = make_world("grid", **world_options(settings, agents))
        mine = [cell.config for cell in cells if cell.agents == agents]
        assert {config.tokenizer.frame_size for config in mine} == {world.frame_size}
        inferred = [config for config in mine if config.model.latent in ("gaussian", "vq")]
        factors = agents + (0 if recipe == "multigrid" else 2)
        width = factors * get_recipe(recipe).model.action_dim
        assert {config.model.latent_width for config in inferred} == {width}
        assert len({config.tokenizer_stage for config in mine}) == 1
        assert len({(config.flam_stage.steps, config.flam_stage.batch_clips) for config in mine}) == 1


def test_the_grid_has_cells_of_whole_pixels_or_as_many_as_are_asked_for() -> None:
    assert world_options(StudySettings(), 4)["cells"] == 6
    assert world_options(StudySettings(recipe="multigrid"), 4)["cells"] == 8
    assert world_options(StudySettings(cells=12), 4)["cells"] == 12
    with pytest.raises(SettingsError, match="frame_size 128 does not hold 6 cells"):
        factoring_cells(StudySettings(recipe="multigrid", cells=6))
    with pytest.raises(SettingsError, match="cells = 0"):
        StudySettings(cells=0)


def test_the_papers_k_and_latent_width_are_what_the_recipe_for_gpus_compares() -> None:
    (flam,) = factoring_cells(StudySettings(recipe="multigrid", agents=(4,), models=("flam",), seeds=1))
    assert (flam.config.model.factors, flam.config.model.latent_width) == (4, 256)
    (more,) = factoring_cells(StudySettings(recipe="multigrid", agents=(4,), models=("flam",), seeds=1, spare=1))
    assert more.config.model.factors == 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"spare": -1}, "spare = -1"),
        ({"gpus": -1}, "gpus = -1"),
        ({"gpus": 2}, "gpus = 2"),
        ({"agents": (2, 2)}, "agents = "),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        StudySettings(**settings)


@pytest.mark.parametrize("recipe", ["tiny", "multigrid"])
def test_codes_are_given_what_it_takes_for_them_to_be_used(recipe: str) -> None:
    cells = factoring_cells(StudySettings(recipe=recipe, agents=(4,), seeds=1))
    coded = [cell.config for cell in cells if cell.config.model.latent == "vq"]
    assert len(coded) == 2
    for config in coded:
        assert config.model.codebook_decay is not None
        assert config.model.codebook_revival > 0
        assert config.model.codebook_centring
        assert config.loss.codebook_warmup > 0


@pytest.mark.parametrize("recipe", ["tiny", "smoke", "multigrid"])
def test_the_models_of_a_world_and_seed_have_one_tokenizer(recipe: str) -> None:
    settings = StudySettings(recipe=recipe, agents=(2, 4), seeds=2)
    cells = factoring_cells(settings)
    made = {(tokenizer_place(settings, Path("folder"), cell), tokenizer_config(cell).sha256()) for cell in cells}
    assert len(made) == 4
    assert len({place for place, _ in made}) == 4


def test_ablations_share_flam_with_the_factoring_study() -> None:
    ablations = ablation_cells(StudySettings())
    assert len(ablations) == len({cell.name for cell in ablations}) == 36
    flam = {cell.name for cell in ablations if cell.model == "flam"}
    assert flam == {cell.name for cell in factoring_cells(StudySettings(agents=(4,), models=("flam",)))}
    configs = [cell.config for cell in ablations if cell.seed == 0]
    assert all(configs.count(config) == 1 for config in configs)  # no two are the same under two names
    assert {config.model.latent_width for config in configs} == {96}
    assert {config.model.factors for config in configs} == {2, 4, 6, 8, 16}

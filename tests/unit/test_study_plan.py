"""What a study trains: cells that fit together, at the sizes of each recipe."""

from __future__ import annotations

import pytest

from flam_core.errors import SettingsError
from flam_core.recipes import get_recipe
from flam_core.worlds import make_world
from services.study import StudySettings, ablation_cells, factoring_cells
from services.study.plan import FACTORING, world_options


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
        width = (agents + 2) * get_recipe(recipe).model.action_dim
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


def test_ablations_share_flam_with_the_factoring_study() -> None:
    ablations = ablation_cells(StudySettings())
    assert len(ablations) == len({cell.name for cell in ablations}) == 33
    flam = {cell.name for cell in ablations if cell.model == "flam"}
    assert flam == {cell.name for cell in factoring_cells(StudySettings(agents=(4,), models=("flam",)))}
    configs = [cell.config for cell in ablations if cell.seed == 0]
    assert all(configs.count(config) == 1 for config in configs)  # no two are the same under two names

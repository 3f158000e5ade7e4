"""A study: its trainings are done once, a stopped one goes on, and its table says what came of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.services.conftest import environment, run_job, said

pytestmark = pytest.mark.timeout(600)
SIZES = ("--recipe", "smoke", "--agents", "2", "3", "--seeds", "1", "--steps", "8", "--tokenizer_steps", "8")
STUDY = ["study", "factoring", *SIZES, "--episodes", "40", "--models"]


@pytest.mark.slow
def test_a_study_does_each_training_once_and_writes_its_table(tmp_path: Path) -> None:
    env = environment()
    first = run_job([*STUDY, "flam"], env, tmp_path)
    assert first.returncode == 0, said(first)
    cells = {place: place.read_bytes() for place in (tmp_path / "outputs/studies/cells").iterdir()}
    assert len(cells) == 2
    second = run_job([*STUDY, "flam", "monolithic-vq"], env, tmp_path)
    assert second.returncode == 0, said(second)
    assert "2 of 4 trainings are done already" in second.stdout
    after = {place: place.read_bytes() for place in (tmp_path / "outputs/studies/cells").iterdir()}
    assert len(after) == 4
    assert cells.items() <= after.items()
    tokenizers = list((tmp_path / "outputs/studies/tokenizers").iterdir())
    assert len(tokenizers) == 2  # shared by the models of a world
    assert len(list((tmp_path / "outputs/studies/data").iterdir())) == 2

    found = json.loads((tmp_path / "docs/results/factoring.json").read_text())
    assert [(row["model"], row["agents"]) for row in found["rows"]] == [
        ("flam", 2),
        ("monolithic-vq", 2),
        ("flam", 3),
        ("monolithic-vq", 3),
    ]
    for row in found["rows"]:
        assert row["seeds"] == 1
        assert {"mean", "se", "low", "high", "n"} == set(row["psnr@10"])
        assert (row["dci"] is None) == (row["model"] == "monolithic-vq")
        cell = next(
            json.loads(text)
            for place, text in after.items()
            if place.name.startswith(f"{row['model']}-agents{row['agents']}-")
        )
        assert row["psnr@1"]["mean"] == cell["metrics"]["rollout/psnr@1"]
        assert row["findings"] == {"0": cell["findings"]}  # eight steps teach nothing: too few to say so
        assert (row["steered"] is None) == (row["model"] == "monolithic-vq")
    assert found["trainings"] == "4 of 4"
    table = list(csv.DictReader((tmp_path / "docs/results/factoring.csv").read_text().splitlines()))
    assert [row["model"] for row in table] == ["flam", "monolithic-vq", "flam", "monolithic-vq"]
    assert "| monolithic-vq | 3 | 1 |" in (tmp_path / "docs/results/factoring.md").read_text()
    assert (tmp_path / "docs/results/factoring.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "outputs").rename(tmp_path / "gone")  # as for someone who has the results alone
    third = run_job([*STUDY, "flam", "monolithic-vq"], env, tmp_path)
    assert third.returncode == 0, said(third)
    assert not (tmp_path / "outputs").exists()
    assert json.loads((tmp_path / "docs/results/factoring.json").read_text())["rows"] == found["rows"]


def test_a_model_that_a_study_has_not_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = run_job([*STUDY, "flamm"], environment(), tmp_path)
    assert done.returncode == 2, said(done)
    assert "flamm" in done.stderr
    assert not (tmp_path / "outputs").exists()

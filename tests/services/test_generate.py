"""`jobs/generate.py`: films from data sets and files, replayed bit for bit, and one clear line for what cannot be."""

from __future__ import annotations

import importlib
import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import services.steering
from flam_core.errors import DataError, FlamError, SettingsError
from flam_core.saved_model import save_model
from flam_core.steering.discovered import discover_actions, load_actions, save_actions
from services.steering import GenerateSettings, generate
from services.storage import Location, resolve
from tests.services.conftest import REPOSITORY, environment, run_job
from tests.steering_fixture import clips, steered
from tests.videos_fixture import encode_video, video_frames

FILES = {"video.mp4", "video.gif", "strip.png", "actions.json", "frames.npz"}
STEPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model, without discovered actions."""
    folder = tmp_path_factory.mktemp("model")
    save_model(steered(), folder, "card")
    return str(folder)


@pytest.fixture
def settings(model: str, grid_data: Path, tmp_path: Path) -> GenerateSettings:
    return GenerateSettings(model, data=str(grid_data), steps=STEPS, out=str(tmp_path / "out"))


def made(settings: GenerateSettings) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the record that it writes."""
    generate(settings)
    out = Path(settings.out)
    assert {path.name for path in out.iterdir()} == FILES
    with Image.open(out / "video.gif") as gif:
        assert gif.n_frames == settings.context + STEPS
    with np.load(out / "frames.npz", allow_pickle=False) as arrays:
        return dict(arrays), json.loads((out / "actions.json").read_text())


MODES = {
    "reconstruct": {"mode": "reconstruct", "context": 2},
    "prior": {"mode": "edit", "slot": 1, "seed": 3},
    "code": {"mode": "edit", "slot": 1, "code": 0},
    "toward": {"mode": "edit", "slot": 2, "toward": "left"},
    "copied": {"mode": "edit", "slot": 0, "from_clip": "1"},
    "free": {"mode": "free", "samples": 2},
    "transfer": {"mode": "transfer", "clip_index": 1, "from_clip": "0"},
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_replayed_bit_for_bit(settings: GenerateSettings, name: str, tmp_path: Path) -> None:
    asked = replace(settings, **MODES[name])
    arrays, record = made(asked)
    assert [len(film["actions"]) for film in record["films"]] == [STEPS] * len(record["films"])
    assert arrays["film_0"].shape == (STEPS, 48, 48, 3)
    assert ("truth" in arrays) == (name != "transfer")
    replay = GenerateSettings(
        asked.model, mode="replay", actions=f"{asked.out}/actions.json", out=str(tmp_path / "again")
    )
    assert generate(replay)["same frames as recorded"] == "yes, bit for bit"
    with np.load(tmp_path / "again" / "frames.npz", allow_pickle=False) as again:
        assert set(again) == set(arrays)
        assert all(np.array_equal(again[key], arrays[key]) for key in arrays)
    assert json.loads((tmp_path / "again" / "actions.json").read_text()) == record


def test_a_record_is_for_its_own_model_and_start(settings: GenerateSettings, tmp_path: Path) -> None:
    made(settings)
    replay = replace(settings, mode="replay", actions=f"{settings.out}/actions.json", steps=None)
    generate(replace(replay, out=str(tmp_path / "same")))  # of the clip that it was made from
    with pytest.raises(DataError, match="start from"):
        generate(replace(replay, clip_index=1))
    save_model(steered(blocks=1), tmp_path / "other", "card")
    with pytest.raises(DataError, match="another model"):
        generate(replace(replay, model=str(tmp_path / "other")))
    whole = Path(settings.out, "frames.npz").read_bytes()
    for damaged in (b"nothing", whole[: len(whole) // 2]):
        Path(settings.out, "frames.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"frames\.npz does not hold"):
            generate(replace(replay, data=None))


def test_a_replay_that_differs_fails_and_signs_nothing(settings: GenerateSettings, tmp_path: Path) -> None:
    _, record = made(settings)
    record["films"][0]["frames_sha256"] = "0" * 64
    kept = Path(settings.out, "actions.json")
    kept.write_text(json.dumps(record))
    again = tmp_path / "again"
    words = ["generate", settings.model, "--mode", "replay", "--actions", str(kept), "--out", str(again)]
    done = run_job(words, environment(), tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (4, False), done.stderr
    assert "1 of 1 films are not those" in done.stderr
    assert json.loads((again / "actions.json").read_text()) == record
    assert (again / "video.mp4").exists()


def test_an_edited_record_is_refused_before_anything_is_drawn(settings: GenerateSettings, tmp_path: Path) -> None:
    _, record = made(replace(settings, mode="edit", slot=1))
    kept, again = Path(settings.out, "actions.json"), tmp_path / "again"
    replay = GenerateSettings(settings.model, mode="replay", actions=str(kept), out=str(again))
    first, last = record["films"]
    for change, why in (
        ({"slot": 77}, "slot 77"),
        ({"slot": -7}, "slot -7"),
        ({"films": [first, last | {"actions": last["actions"][:1]}]}, r"\[1, 3, 8\]"),
    ):
        kept.write_text(json.dumps(record | change))
        with pytest.raises(DataError, match=why):
            generate(replay)
    kept.write_text(json.dumps(record))
    np.savez(Path(settings.out, "frames.npz"), start=np.uint8(0))
    with pytest.raises(DataError, match=r"frames\.npz does not hold"):
        generate(replay)
    assert not again.exists()


@pytest.mark.parametrize("show_fps", [0.1, 100.0])
def test_the_slowest_and_the_fastest_film_are_written(settings: GenerateSettings, show_fps: float) -> None:
    made(replace(settings, show_fps=show_fps))


def test_what_lies_in_a_bucket_is_read_from_it(
    settings: GenerateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(video_frames(1)[0]).save(tmp_path / "picture.png")
    asked: list[str] = []

    def bucket(address: str) -> Location:  # the local folder stands for it
        asked.append(address)
        return resolve(address.replace("s3://bucket", str(tmp_path)))

    for module in ("clips", "generate"):
        monkeypatch.setattr(importlib.import_module(f"services.steering.{module}"), "resolve", bucket)
    made(replace(settings, data=None, mode="free", samples=1, clip="s3://bucket/picture.png"))
    record = "s3://bucket/out/actions.json"
    generate(GenerateSettings(settings.model, mode="replay", actions=record, out=str(tmp_path / "again")))
    wanted = ["s3://bucket/picture.png", record, "s3://bucket/out/frames.npz"]
    assert [one for one in asked if one.startswith("s3:")] == wanted


def test_files_of_any_size_are_scenes(settings: GenerateSettings, tmp_path: Path) -> None:
    frames = video_frames(8)
    encode_video(tmp_path / "wide.mp4", frames[:, 20:100])
    Image.fromarray(frames[0]).save(tmp_path / "picture.png")
    nothing_stored = replace(settings, data=None)
    arrays, _ = made(replace(nothing_stored, clip=str(tmp_path / "wide.mp4")))
    assert arrays["truth"].shape == (1 + STEPS, 48, 48, 3)
    free = replace(nothing_stored, mode="free", clip=str(tmp_path / "picture.png"), samples=3)
    # Where frames are fed back, an untrained model settles all draws to one.
    arrays, record = made(replace(free, feedback="slots"))
    assert "truth" not in arrays
    assert len({film["frames_sha256"] for film in record["films"]}) == 3
    with pytest.raises(DataError, match="1 frames, and 1 given"):
        generate(replace(nothing_stored, clip=str(tmp_path / "picture.png")))


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"mode": "edit", "slot": 5}, SettingsError, "no slot 5. Its slots are 0, 1, 2"),
        ({"mode": "edit", "slot": 0, "code": 99}, SettingsError, "slot 0 has no code 99"),
        ({"mode": "edit", "slot": 0, "code": 0, "data": None, "clip": "FILM"}, SettingsError, "no discovered actions"),
        ({"clip_index": 4000}, DataError, "number 4000 is asked for"),
        ({"steps": 400}, DataError, "400 steps need 401"),
        ({"data": None}, SettingsError, "does not say which data it was trained on"),
        ({"data": "/nowhere"}, DataError, "nowhere"),
        ({"mode": "transfer", "from_clip": "absent.mp4"}, DataError, "absent.mp4 is not a file"),
    ],
)
def test_what_cannot_be_is_one_clear_error(
    settings: GenerateSettings, tmp_path: Path, change: dict, error: type[FlamError], why: str
) -> None:
    if change.get("clip") == "FILM":
        encode_video(tmp_path / "film.mp4", video_frames(8))
        change = change | {"clip": str(tmp_path / "film.mp4")}
    with pytest.raises(error, match=why):
        generate(replace(settings, **change))
    assert not Path(settings.out).exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"mode": "edit"}, "needs --slot"),
        ({"mode": "transfer"}, "needs --from_clip"),
        ({"mode": "replay"}, "needs --actions"),
        ({"slot": 1}, "no use for --slot"),
        ({"mode": "edit", "slot": 1, "code": 1, "toward": "up"}, "--code and --toward"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": 10_000}, "steps = 10000"),
        ({"samples": 0, "mode": "free"}, "samples = 0"),
        ({"mode": "edit", "slot": 1, "samples": 2}, "no use for --samples"),
        ({"mode": "replay", "actions": "actions.json", "steps": 3}, "no use for --steps"),
        ({"show_fps": 0.0}, "show_fps = 0.0"),
        ({"show_fps": 0.001}, "show_fps = 0.001. Choose 0.1 to 100"),
        ({"show_fps": 101.0}, "show_fps = 101"),
        ({"show_fps": float("nan")}, "show_fps = nan"),
        ({"fps": 0.0}, "fps = 0.0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, "seed = "),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_read(arguments: dict, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        GenerateSettings("outputs/latest", **arguments)


def test_the_program_says_what_is_wrong_in_one_line(grid_data: Path, model: str, tmp_path: Path) -> None:
    for arguments, code, why in (
        ([str(tmp_path)], 4, "no model at"),
        ([model, "--mode", "edit"], 2, "--mode edit needs --slot"),
    ):
        done = run_job(["generate", *arguments, "--data", str(grid_data)], environment(), tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        assert why in done.stderr


def test_an_interrupted_film_is_not_said_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: GenerateSettings) -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(services.steering, "generate", interrupted)
    monkeypatch.setattr(sys, "argv", ["generate.py", "outputs/latest"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the program puts the repository there
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "jobs" / "generate.py"), run_name="__main__")
    assert end.value.code == 130
    assert capsys.readouterr().err == "flam: stopped. The same command begins anew.\n"


@pytest.mark.parametrize("change", [{"mode": "transfer", "from_clip": "0"}, {"mode": "edit", "slot": 0}])
@pytest.mark.parametrize("given", [{}, {"from_clip": "0"}, {"clip": "absent.mp4", "from_clip": "0"}])
def test_nothing_is_carried_over_where_there_are_no_latent_actions(
    settings: GenerateSettings, tmp_path: Path, change: dict, given: dict
) -> None:
    save_model(steered(latent="none", motion_readout=False), tmp_path / "none", "card")
    with pytest.raises(SettingsError, match="'none' has no latent actions of its own"):
        generate(replace(settings, model=str(tmp_path / "none"), **{**given, **change}))


def test_discovered_actions_of_another_model_are_refused(settings: GenerateSettings, tmp_path: Path) -> None:
    folder = shutil.copytree(settings.model, tmp_path / "explained")
    save_actions(discover_actions(steered(factors=2), clips(), most=3), folder)
    for change in (
        {"mode": "edit", "slot": 2, "toward": "left"},
        {"mode": "edit", "slot": 2, "code": 0},
        {"mode": "reconstruct"},
    ):
        with pytest.raises(
            DataError, match=r"of another model: of 2 slots with .* 12 numbers, and the model has 3 with 8"
        ):
            generate(replace(settings, model=str(folder), **change))
    assert not Path(settings.out).exists()


def test_codes_that_lie_with_the_model_are_used(settings: GenerateSettings, tmp_path: Path) -> None:
    folder = shutil.copytree(settings.model, tmp_path / "explained")
    save_actions(discover_actions(steered(), clips(), most=3), folder)
    found = load_actions(folder)
    assert found is not None
    _, record = made(replace(settings, model=str(folder), mode="edit", slot=1, code=1))
    edited = np.array(record["films"][1]["actions"], dtype=np.float32)[:, 1]
    assert np.array_equal(edited, np.tile(found.vector(1, 1).numpy(), (STEPS, 1)))
    assert {codes[1] for codes in record["films"][1]["codes"]} == {1}

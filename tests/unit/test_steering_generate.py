"""Films: drawn again, edited one slot at a time, imagined, carried over; recorded and replayed bit for bit."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flam_core.errors import DataError, SettingsError
from flam_core.steering import generate
from flam_core.steering.clips import read_clip
from flam_core.steering.generate import Film
from flam_core.steering.pictures import Panel, film_gif, film_mp4, film_strip, masks_panel
from flam_core.steering.record import Record, read_record, record_film
from tests.steering_fixture import clips, steered
from tests.videos_fixture import encode_video, video_frames

STEPS = 5


def inferred(clip: torch.Tensor) -> torch.Tensor:
    model = steered()
    return model.infer_actions(model.slots(model.encode(clip[None]))[0])[0]


def recorded(film: Film) -> Record:
    start = generate.frames_digest(film.start)
    films = [record_film("a film", film, None)]
    return Record("model", "5e" * 32, "free", 0, "frames", None, {}, len(film.start), start, films)


@pytest.mark.parametrize("context", [1, 3])
def test_a_clip_is_drawn_again_as_a_rollout_of_its_inferred_actions(context: int) -> None:
    model, clip = steered(), clips()[0]
    film = generate.reconstruct(model, clip, context, STEPS, feedback="frames")
    taken = inferred(clip[: context + STEPS])
    assert torch.equal(torch.cat([film.known, film.actions]), taken)
    rolled = model.rollout(clip[None, :context], taken[None], "frames")[0]
    assert torch.equal(film.frames, (rolled * 255).round().to(torch.uint8))
    assert torch.equal(film.all_frames[:context], clip[:context])
    assert film.masks is not None
    assert film.masks.shape == (context + STEPS, 3, film.masks.shape[2])


def test_an_edit_changes_the_actions_of_one_slot_alone() -> None:
    model, clip = steered(), clips()[0]
    own = inferred(clip[: 1 + STEPS])
    for change in (generate.prior(3), generate.follow(torch.ones(STEPS, 3, 8))):
        film = generate.edit(model, clip, 1, STEPS, 1, change, feedback="frames")
        assert torch.equal(film.actions[:, [0, 2]], own[:, [0, 2]])
        assert not torch.isclose(film.actions[:, 1], own[:, 1]).all(dim=-1).any()
    assert (film.actions[:, 1] == 1).all()
    plain = generate.reconstruct(model, clip, 1, STEPS, feedback="frames")
    assert not torch.equal(film.frames, plain.frames)


def test_futures_differ_by_seed_and_by_nothing_else() -> None:
    model, picture = steered(), clips()[0][:1]
    first, again, other = (generate.imagine(model, picture, STEPS, seed, feedback="frames") for seed in (1, 1, 2))
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.actions, other.actions)


def test_actions_of_one_clip_are_done_in_another_scene() -> None:
    model, (here, there, _) = steered(), clips()
    film = generate.transfer(model, here, there, 1, STEPS, feedback="frames")
    assert torch.equal(film.actions, inferred(there[: 1 + STEPS]))
    assert torch.equal(film.start, here[:1])


@pytest.mark.parametrize("context", [1, 2])
def test_a_record_is_replayed_bit_for_bit(context: int) -> None:
    model, clip = steered(), clips()[0]
    film = generate.edit(model, clip, context, STEPS, 0, generate.prior(0), feedback="frames")
    record = read_record(recorded(film).to_json().encode(), "actions.json")
    assert record == recorded(film)
    record.check("5e" * 32, clip[:context])
    again = generate.replay(model, clip[:context], *record.films[0].tensors, feedback=record.feedback)
    assert torch.equal(again.actions, film.actions)
    assert torch.equal(again.frames, film.frames)
    assert generate.frames_digest(again.frames) == record.films[0].frames_sha256
    with pytest.raises(DataError, match="Latent actions mean nothing to another model"):
        record.check("00" * 32, clip[:context])
    with pytest.raises(DataError, match="start from"):
        record.check("5e" * 32, clip[1 : 1 + context])


def test_what_is_no_record_is_refused() -> None:
    good = json.loads(recorded(generate.imagine(steered(), clips()[0][:1], 1, 0, feedback="frames")).to_json())
    for change, why in (
        ({"films": []}, "without films"),
        ({"version": 7}, "version 7"),
        ({"seed": "x"}, "seed"),
        ({"more": 1}, "more"),
        ({"start_frames": 0}, "start_frames"),
        ({"films": [good["films"][0] | {"actions": [[["NaN"]]]}]}, "films"),
        ({"films": [good["films"][0] | {"actions": []}]}, r"films\.0\.actions"),
        ({"films": [good["films"][0] | {"actions": [[[1.0]]] * (generate.MOST_STEPS + 1)}]}, r"films\.0\.actions"),
        ({"films": [good["films"][0] | {"label": "$1"}]}, r"films\.0\.label"),
        ({"films": [good["films"][0] | {"actions": [[[1.0], [1.0, 2.0]]]}]}, "differ in length"),
    ):
        with pytest.raises(DataError, match=why):
            read_record(json.dumps(good | change).encode(), "actions.json")
    with pytest.raises(DataError, match=r"x\.json is no record"):
        read_record(b"\x00", "x.json")


def test_a_record_whose_parts_do_not_fit_together_is_refused() -> None:
    film = generate.imagine(steered(), clips()[0][:2], 3, 0, feedback="frames")
    good = json.loads(recorded(film).to_json())
    one = good["films"][0]

    def films(**change: object) -> dict[str, list]:
        return {"films": [one, one | {"label": "another"} | change]}

    read_record(json.dumps(good | films() | {"slot": 2}).encode(), "x.json")
    narrow = [[[0.0]] * 3] * 3
    for change, why in (
        ({"slot": 77}, "slot 77, and the films have slots 0 to 2"),
        ({"slot": -7}, "slot -7"),
        ({"slot": 3}, "slot 3"),
        (films(actions=one["actions"][:1]), r"'another' are \[1, 3, 8\], and those of 'a film' \[3, 3, 8\]"),
        (films(actions=narrow), r"'another' are \[3, 3, 1\]"),
        (films(label="a film"), "same label"),
        (films(known=[]), r"2 given frames have known actions \[1, 3, 8\], not \[0, 3, 8\]"),
        (films(known=narrow[:1]), r"not \[1, 3, 1\]"),
        ({"start_frames": 5}, "5 given frames"),
        ({"films": [one | {"actions": [[]]}]}, "are empty"),
        ({"films": [one | {"actions": [[[]]]}]}, "are empty"),
        ({"films": [one | {"known": [[[1e300] * 8] * 3]}]}, "beyond float32"),
    ):
        with pytest.raises(DataError, match=rf"x\.json: .*{why}"):
            read_record(json.dumps(good | change).encode(), "x.json")


def test_what_cannot_be_asked_is_named() -> None:
    model, clip = steered(), clips()[0]
    prior = generate.prior(0)
    with pytest.raises(SettingsError, match=r"no slot 3. Its slots are 0, 1, 2"):
        generate.edit(model, clip, 1, STEPS, 3, prior, feedback="frames")
    with pytest.raises(SettingsError, match="no slots"):
        generate.edit(steered(state="patches"), clip, 1, STEPS, 0, prior, feedback="frames")
    with pytest.raises(DataError, match="9 frames, and 1 given \\+ 12 steps need 13"):
        generate.reconstruct(model, clip, 1, 12, feedback="frames")
    with pytest.raises(DataError, match="9 frames, and 10 are to be given"):
        generate.transfer(model, clip, clips(1, 20)[0], 10, 3, feedback="frames")
    for steps in (0, -1, generate.MOST_STEPS + 1):
        with pytest.raises(SettingsError, match=f"steps = {steps}"):
            generate.imagine(model, clip[:1], steps, 0, feedback="frames")
    without = steered(latent="none", motion_readout=False)
    with pytest.raises(SettingsError, match="'none' has no latent actions"):
        generate.edit(without, clip, 1, STEPS, 0, generate.follow(torch.ones(STEPS, 3, 8)), feedback="frames")
    with pytest.raises(SettingsError, match="'none' has no latent actions"):
        generate.transfer(without, clip, clips()[1], 1, STEPS, feedback="frames")
    with pytest.raises(SettingsError, match="true actions"):
        generate.infer(steered(state="patches", factors=1, latent="true", true_actions=(2, 1, 5)), clip, 1, 3)


def test_videos_and_pictures_of_any_size_are_read(tmp_path: Path) -> None:
    frames = video_frames(12)
    encode_video(tmp_path / "wide.mp4", frames[:, :64])
    assert read_clip(tmp_path / "wide.mp4", 48, 5).shape == (5, 48, 48, 3)
    assert read_clip(tmp_path / "wide.mp4", 48, 99).shape == (12, 48, 48, 3)
    assert len(read_clip(tmp_path / "wide.mp4", 48, 99, fps=5)) == 6
    Image.fromarray(frames[0]).save(tmp_path / "picture.png")
    picture = read_clip(tmp_path / "picture.png", 48, 5)
    assert picture.shape == (1, 48, 48, 3)
    assert (picture[0].float() - read_clip(tmp_path / "wide.mp4", 48, 1)[0].float()).abs().mean() > 0
    for name, content, why in (
        ("broken.mp4", b"no video at all", "cannot be used"),
        ("broken.png", b"no picture", "cannot be used"),
        ("notes.txt", b"", "neither a video nor a picture"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=why):
            read_clip(tmp_path / name, 48, 5)
    with pytest.raises(DataError, match="is not a file"):
        read_clip(tmp_path / "absent.mp4", 48, 5)


def test_films_become_files_that_others_open() -> None:
    clip = clips()[0].numpy()
    masks = np.full((9, 3, 36), 1 / 3, dtype=np.float32)
    panels = [Panel("truth", clip), Panel("slot 1\nedited", clip[::-1]), masks_panel("slots", clip, masks, 1)]
    with av.open(io.BytesIO(film_mp4(panels, 1, 4.0))) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 4
    assert len(decoded) == 9
    height, width = decoded[0].shape[:2]
    assert (height % 2, width % 2) == (0, 0)
    with Image.open(io.BytesIO(film_gif(panels, 1, 4.0))) as gif:
        assert gif.n_frames == 9
        assert gif.size == (width, height)
        shown = np.asarray(gif.convert("RGB"))
    assert (shown.reshape(-1, 3) == clip[0, 0, 0]).all(axis=1).any()  # the truth is in it as it is
    with Image.open(io.BytesIO(film_strip(panels, 1, 3, 1))) as strip:
        assert strip.width > 9 * 48
    both = replace(panels[2], frames=masks_panel("slots", clip, masks).frames)
    assert not np.array_equal(both.frames, panels[2].frames)  # the marked slot stands out

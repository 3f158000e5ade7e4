"""Scenes, tokens and what stands before every request: all that needs no server."""

from __future__ import annotations

import asyncio
import io
import json
import math
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from flam_core.errors import DataError, SettingsError
from flam_core.steering import generate
from flam_core.steering.directions import directed
from flam_core.steering.record import read_record
from services.player.errors import Busy, Gone
from services.player.film import gif, record
from services.player.guard import Access, Guard
from services.player.inference import check_roll, edit, infer, roll
from services.player.models import Served, StartClip
from services.player.sessions import Session, Sessions, Side
from services.player.settings import Binding, Limits, PlayerSettings
from services.player.token import allowed, choose_token, digest, is_loopback
from services.player.wire import OpenBody, PutArrow, PutCode, StepBody
from services.player.work import ToEdit, ToRoll
from tests.services.player_fixture import SIZE, SLOTS, small_model, some_actions

CLIPS = [
    StartClip(np.random.default_rng(seed).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8), f"clip {seed}")
    for seed in range(2)
]
LIMITS = Limits()


def served(seed: int = 0, address: str = "model", version: str | None = None) -> Served:
    return Served(small_model(seed), some_actions(seed), address, version, str(seed) * 64)


def session(*models: Served, limits: Limits = LIMITS) -> Session:
    return Session(models or (served(),), CLIPS, OpenBody(clip=1, seed=5), "frames", limits)


def pictures(one: Session, side: int = 0) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in one.sides[side].film])


def inferred(one: Served) -> torch.Tensor:
    frames = torch.from_numpy(CLIPS[1].frames)[None]
    return one.model.infer_actions(one.model.slots(one.model.encode(frames))[0])[0]


def test_a_scene_is_bit_for_bit_the_models_rollout_of_what_was_done() -> None:
    model = served()
    one = session(model)
    wanted = inferred(model)[:4].clone()
    wanted[0, 2] = model.actions.vectors[2][3]
    one.step(StepBody(slot=2, code=3))
    for step, body in ((1, StepBody(slot=0, arrow="up")), (2, StepBody(slot=1))):
        assert body.slot is not None
        way, examples = body.arrow or "still", model.actions.examples[body.slot]
        found = directed(one.sides[0].scene, body.slot, way, examples, wanted[step])
        one.step(body)
        wanted[step, body.slot] = found.action
        assert one.sides[0].arrives is found.arrives
    one.step(StepBody())
    start = torch.from_numpy(CLIPS[1].frames[None, :1])
    rolled = model.model.rollout(start, wanted[None], "frames")
    assert torch.equal(torch.stack(one.sides[0].taken), wanted)
    assert np.array_equal(pictures(one)[1:], (rolled[0] * 255).round().to(torch.uint8).numpy())


def test_others_stand_still_when_the_video_has_ended_and_draw_by_the_seed() -> None:
    one, other = session(), session()
    for _ in range(7):
        one.step(StepBody())
    assert torch.equal(one.sides[0].taken[5], inferred(one.sides[0].served)[5])
    last = one.sides[0].taken[6]
    one.undo()
    assert torch.equal(one.sides[0].served.still(one.sides[0].scene), last)
    for both in (one, other):
        both.step(StepBody(others="prior"))
    drawn = one.sides[0].taken[6]
    assert torch.equal(one.sides[0].generator.get_state(), other.sides[0].generator.get_state())
    one.undo()
    one.step(StepBody(others="prior"))
    assert torch.equal(one.sides[0].taken[6], drawn)  # what was undone is drawn again


def test_undo_goes_back_as_far_as_the_limit_and_gives_the_same_frames() -> None:
    one = session(limits=Limits(undo=2))
    for code in (1, 2, 3):
        one.step(StepBody(slot=0, code=code))
    before = pictures(one)
    one.undo()
    one.undo()
    with pytest.raises(DataError, match="no step to take back"):
        one.undo()
    for code in (2, 3):
        one.step(StepBody(slot=0, code=code))
    assert np.array_equal(pictures(one), before)
    assert session(limits=Limits(undo_mb=1e-6))._past.maxlen == 1


def test_a_challenger_does_the_same_from_the_same_start() -> None:
    twin, other = served(), served(1)
    one = session(served(), twin, other)
    one.step(StepBody(slot=1, code=4))
    assert np.array_equal(pictures(one, 0), pictures(one, 1))
    assert np.array_equal(pictures(one, 2)[0], pictures(one, 0)[0])
    slot = one.sides[2].slot
    assert slot is not None
    assert torch.equal(one.sides[2].taken[0][slot], other.actions.vectors[slot][4])  # its own for the same motion


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (StepBody(slot=SLOTS, code=0), "slots (are )?0 to 2"),
        (StepBody(slot=0, code=5), "Its codes are 0 to 4"),
        (StepBody(slot=0, code=1, arrow="up"), "both"),
        (StepBody(code=1), "no slot"),
    ],
)
def test_a_step_that_cannot_be_leaves_the_scene_alone(body: StepBody, said: str) -> None:
    one = session()
    with pytest.raises(SettingsError, match=said):
        one.step(body)
    assert one.steps == 0
    assert len(one.sides[0].film) == 1


def test_where_one_model_fails_neither_takes_the_step() -> None:
    one = session(served(), served(1))
    one.step(StepBody())
    before = [pictures(one, side) for side in range(2)]
    kept = one.sides[1].video
    one.sides[1].video = torch.full_like(kept, torch.nan)
    with pytest.raises(DataError, match="not finite"):
        one.step(StepBody())
    assert [len(side.taken) for side in one.sides] == [1, 1]
    assert all(np.array_equal(pictures(one, side), before[side]) for side in range(2))
    one.sides[1].video = kept
    one.step(StepBody())
    other = session(served(), served(1))
    for _ in range(2):
        other.step(StepBody())
    assert all(np.array_equal(pictures(one, side), pictures(other, side)) for side in range(2))


def test_a_record_is_replayed_by_generate() -> None:
    one = session()
    for code in (4, 0, 2):
        one.step(StepBody(slot=1, code=code, others="prior"))
    kept = read_record(record(one, 0, "frames").encode(), "actions.json")
    start = torch.from_numpy(CLIPS[1].frames[:1])
    kept.check("0" * 64, start)
    model = one.sides[0].served.model
    known, actions = kept.films[0].tensors
    film = generate.replay(model, start, known, actions, feedback="frames")
    assert generate.frames_digest(film.frames) == kept.films[0].frames_sha256
    assert [row[1] for row in kept.films[0].codes or []] == [4, 0, 2]
    with pytest.raises(SettingsError, match="nothing to replay"):
        record(session(), 0, "frames")


@pytest.mark.parametrize(
    ("address", "version", "exact"),
    [
        ("models:/flam-grid@champion", "3", "models:/flam-grid/3"),
        ("models:/flam-grid/2", "2", "models:/flam-grid/2"),
        ("/outputs/a@b", None, "/outputs/a@b"),
    ],
)
def test_a_record_names_the_model_that_an_alias_meant(address: str, version: str | None, exact: str) -> None:
    one = session(served(address=address, version=version))
    one.step(StepBody(slot=1, code=2))
    assert read_record(record(one, 0, "frames").encode(), "actions.json").model == exact


def test_a_gif_has_a_page_for_each_frame_of_both_sides() -> None:
    one = session(served(), served(1))
    for _ in range(4):
        one.step(StepBody(slot=0, arrow="up"))
    content = gif([side.film for side in one.sides], since=1)
    with Image.open(io.BytesIO(content)) as image:
        assert getattr(image, "n_frames", 1) == 4
        assert image.size == (2 * 288 + 12, 288)
    with pytest.raises(SettingsError, match="begins at 9"):
        gif([side.film for side in one.sides], since=9)


def test_sessions_are_bounded_and_end_when_left_alone() -> None:
    now = [0.0]
    sessions = Sessions(Limits(sessions=2, idle_seconds=10, full_seconds=8), lambda: now[0])
    first, second = session(), session()
    sessions.add(first)
    now[0] = 6
    sessions.add(second)
    with pytest.raises(Busy, match="all 2 places"):
        sessions.room()
    now[0] = 11
    sessions.room()
    assert sessions.get(second.id) is second
    with pytest.raises(Gone, match="left alone"):
        sessions.get(first.id)
    now[0] = 20
    sessions.end(second.id)
    assert len(sessions) == 0


def test_requests_that_go_together_give_what_each_gives_alone() -> None:
    model = served()
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 256, (t, SIZE, SIZE, 3), dtype=np.uint8) for t in (3, 5, 3)]
    for (actions, codes), clip in zip(infer(model, clips), clips, strict=True):
        (alone,) = infer(model, [clip])
        assert np.allclose(actions, alone[0], atol=1e-5)
        assert codes.shape == (len(clip) - 1, SLOTS)
    asked = [ToRoll(clip[:2], rng.normal(size=(4, SLOTS, 4)).astype(np.float32), "frames") for clip in clips]
    for frames, one in zip(roll(model, asked), asked, strict=True):
        wanted = model.model.rollout(torch.from_numpy(one.frames[None]), torch.from_numpy(one.actions[None]), "frames")
        assert frames.shape == (3, SIZE, SIZE, 3)
        assert np.abs(frames - wanted[0].numpy() * 255).max() < 2
    with pytest.raises(DataError, match="make 0 steps"):
        check_roll(model, ToRoll(clips[0], asked[0].actions[:2], "frames"), 16)


def test_an_edit_changes_one_slots_actions() -> None:
    model, clip = served(), CLIPS[1].frames
    _, actions = edit(model, ToEdit(clip, 2, PutCode(kind="code", code=1), "frames"))
    arrow, _ = edit(model, ToEdit(clip, 2, PutArrow(kind="arrow", arrow="up"), "frames"))
    go = generate.go(2, "up", model.actions.examples[2], inferred(model))
    film = generate.edit(model.model, torch.from_numpy(clip), 1, 6, 2, go, feedback="frames")
    assert np.array_equal(arrow, film.frames.numpy())
    assert np.array_equal(actions[:, 2], model.actions.vectors[2][1].expand(6, -1).numpy())
    assert np.array_equal(actions[:, :2], inferred(model)[:, :2].numpy())


def test_a_token_is_asked_for_beyond_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAM_PLAYER_TOKEN", raising=False)
    assert choose_token(None, "127.0.0.1") is None
    assert choose_token(None, "127.0.0.1", shared=True)  # on a cluster nobody knows who reaches its head
    made = choose_token(None, "0.0.0.0")
    assert made is not None
    assert made != choose_token(None, "0.0.0.0")
    assert len(made) >= 32
    monkeypatch.setenv("FLAM_PLAYER_TOKEN", "of-the-environment")
    assert choose_token(None, "127.0.0.1") == "of-the-environment"
    with pytest.raises(SettingsError):
        choose_token("short", "127.0.0.1")
    assert not is_loopback("example.org")
    assert allowed({"authorization": f"Bearer {made}"}, digest(made))
    assert allowed({"cookie": f"a=b; flam_token={made}"}, digest(made))
    assert not allowed({"authorization": f"Bearer {made}x"}, digest(made))
    assert not allowed({"cookie": "flam_token="}, digest(made))


def test_the_guard_refuses_before_it_reads() -> None:
    entered: list[bytes] = []

    async def app(scope: object, receive: object, send: object) -> None:
        entered.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    guard = Guard(app, Access(digest("t" * 16), None), Limits(body_mb=0.001, queue=1))

    def ask(
        path: str = "/api", query: str = "", body: bytes = b"", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        sent: list[dict] = []
        raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        parts = [{"type": "http.request", "body": b, "more_body": True} for b in (body[:600], body[600:])]
        parts.append({"type": "http.request", "body": b"", "more_body": False})

        async def receive() -> dict:
            return parts.pop(0)

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {"type": "http", "path": path, "query_string": query.encode(), "headers": raw, "scheme": "http"}
        asyncio.run(guard(scope, receive, send))
        return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, sent[1]["body"]

    token = {"authorization": f"Bearer {'t' * 16}"}
    assert ask()[0] == 401
    assert json.loads(ask()[2])["fix"]
    status, headers, _ = ask("/", query=f"token={'t' * 16}")
    assert (status, headers["location"]) == (303, "./")
    assert "HttpOnly; SameSite=Strict" in headers["set-cookie"]
    assert ask("/", query="token=x")[0] == 401
    assert not entered
    assert ask(body=b"x" * 900, **token)[0] == 200
    assert entered == [b"x" * 900]
    assert ask(body=b"x" * 1100, **token)[0] == 413
    assert ask(content_length="1001", **token)[0] == 413
    assert ask("/health")[0] == 200
    guard._inside = 2
    status, headers, _ = ask(**token)
    assert (status, headers["retry-after"]) == (503, "1")
    assert ask("/health", body=b"x" * 2000)[0] == 200  # who asks whether it is well is not to be told that it is busy
    assert entered.pop() == b""  # and nobody fills its memory by asking
    guard._access = Access(None, ("localhost",))
    guard._inside = 0
    assert ask(host="localhost:8000")[0] == 200
    assert ask(host="evil.example")[0] == 403


def test_settings_that_cannot_be_are_named() -> None:
    for value in (0, -1, math.nan, math.inf):
        with pytest.raises(SettingsError, match=r"limits\.idle_seconds"):
            Limits(idle_seconds=value)
    for change in (
        {"seed": -1},
        {"seed": 2**53},
        {"clip_frames": 1},
        {"replicas": 0},
        {"poll_seconds": math.nan},
        {"gpus": 1.5},
    ):
        with pytest.raises(SettingsError, match=next(iter(change))):
            PlayerSettings(model="model", **change)
    with pytest.raises(SettingsError, match="--no_token and --token"):
        Binding(no_token=True, token="t" * 16)


def test_two_models_step_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one, alone = session(served(), served(1)), session(served(1))
    both = threading.Barrier(2, timeout=60)
    own = Session._others

    def meet(self: Session, side: Side, body: StepBody) -> torch.Tensor:
        both.wait()  # breaks where one waits for the other to be done
        return own(self, side, body)

    monkeypatch.setattr(Session, "_others", meet)
    for _ in range(6):
        one.step(StepBody())
    monkeypatch.undo()
    for _ in range(6):
        alone.step(StepBody())
    assert np.array_equal(pictures(one, 1), pictures(alone))


def test_a_full_server_gives_away_the_place_of_who_has_gone() -> None:
    now = [0.0]
    sessions = Sessions(Limits(sessions=2), lambda: now[0])
    first, second = session(), session()
    sessions.add(first)
    now[0] = 30
    sessions.add(second)
    now[0] = 59
    with pytest.raises(Busy, match="all 2 places"):
        sessions.room()
    now[0] = 61
    sessions.room()
    assert sessions.get(second.id) is second
    with pytest.raises(Gone, match="60 s while the server was full"):
        sessions.get(first.id)
    now[0] = 800
    sessions.room()  # there is room, so nobody's ends
    assert sessions.get(second.id) is second


def test_what_undo_keeps_stays_below_its_bound_when_states_have_grown() -> None:
    one = session(served(), served(1), limits=Limits(undo_mb=0.5))
    for _ in range(60):
        one.step(StepBody(slot=0, code=1))
    kept = [value for before in one._past for state in before.states for value in vars(state).values()]
    assert 3 <= len(one._past) < 60
    assert sum(value.nbytes for value in kept if isinstance(value, torch.Tensor)) <= 0.5 * 2**20

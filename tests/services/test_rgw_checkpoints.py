"""Checkpoints in Ceph's S3 gateway: whole, torn, and of a store that cannot be reached."""

from __future__ import annotations

import numpy as np
import pytest

from flam_core.errors import EnvironmentFault
from flam_core.learning.state import TrainState
from services.storage import Location, read_bytes, resolve, write_bytes
from services.training import checkpoints
from tests.services.conftest import free_ports
from tests.services.rgw_fixture import Gateway, objects, put, use

pytestmark = pytest.mark.rgw
pytest_plugins = ("tests.services.rgw_fixture",)


def save(run: Location, step: int) -> None:
    checkpoints.save(run, state(step))


def state(step: int) -> TrainState:
    return TrainState(b"model %d" % step, b"optimizer %d" % step, None, {"step": step, "loss": 0.5})


def test_checkpoints(place: Location) -> None:
    assert checkpoints.newest(place) is None
    assert checkpoints.newest_step(place) == 0
    for step in (10, 20, 30):
        save(place, step)
        assert checkpoints.newest_step(place) == step
    found = checkpoints.newest(place)
    assert found == state(30)
    assert {name.split("/")[1] for name in objects(place)} == {"index.json", "step-00000020", "step-00000030"}
    save(place, 30)  # a step taken again after a restart
    assert checkpoints.newest(place) == found
    large = np.random.default_rng(1).bytes(18 << 20)
    checkpoints.save(place, TrainState(large, large[::-1], b"mean", {"step": 40}))
    assert checkpoints.newest(place) == TrainState(large, large[::-1], b"mean", {"step": 40})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("COMMIT", None),
        ("COMMIT", b'{"model.safetens'),
        ("model.safetensors", None),
        ("model.safetensors", b"model"),
        ("optimizer.pt", b""),
        ("meta.json", b'{"step": 31}'),
    ],
)
def test_a_torn_newest_checkpoint_is_passed_over(
    gateway: Gateway, place: Location, name: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (20, 30):
        save(place, step)
    torn = place / f"checkpoints/step-00000030/{name}"
    if content is None:
        place.fs.delete_file(torn.path)
    else:
        put(gateway, torn, content)
    found = checkpoints.newest(place)
    assert found == state(20)
    assert "step-00000030" in capsys.readouterr().out
    save(place, 30)  # the run goes on from 20 and comes by again
    found = checkpoints.newest(place)
    assert found == state(30)


def test_a_checkpoint_without_a_place_in_the_index_is_none(place: Location) -> None:
    save(place, 20)
    index = read_bytes(place / "checkpoints/index.json")
    save(place, 30)
    write_bytes(place / "checkpoints/index.json", index)  # as if killed just before
    found = checkpoints.newest(place)
    assert found == state(20)


def test_checkpoints_of_a_lost_storage_are_not_taken_for_none(
    gateway: Gateway, place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(place, 20)
    for variables in (
        gateway.environment(gateway.owner, AWS_SECRET_ACCESS_KEY="wrong"),
        gateway.environment(gateway.owner, AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_ports(1)[0]}"),
    ):
        use(monkeypatch, variables | {"FLAM_STORAGE_RETRY_SECONDS": "2"})
        lost = resolve(place.uri, check=False)
        for ask in (checkpoints.newest, checkpoints.newest_step):
            with pytest.raises(EnvironmentFault):
                ask(lost)

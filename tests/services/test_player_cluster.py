"""A player on a cluster that others use: it asks for a token, and takes nobody's place. Serve is a stand-in here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import HTTPOptions

from flam_core.errors import EnvironmentFault
from services.player import run
from services.player.settings import Binding, PlayerSettings


class Serve:
    """Ray Serve on a cluster, with what it serves."""

    def __init__(self, **http: Any) -> None:
        self.http, self.applications = HTTPOptions(**http), {"another"}
        self.context = lambda: SimpleNamespace(http_config=self.http)

    def start(self, **_: Any) -> None:
        """It runs already: options are ignored."""

    def status(self) -> Any:
        return SimpleNamespace(applications=dict.fromkeys(self.applications))

    def run(self, _: Any, *, name: str, **__: Any) -> None:
        self.applications.add(name)

    def delete(self, name: str) -> None:
        self.applications.remove(name)

    def get_app_handle(self, _: str) -> Any:
        answer = SimpleNamespace(result=lambda timeout_s: None)
        return SimpleNamespace(ready=SimpleNamespace(remote=lambda: answer))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """One that is joined, on whose head Serve listens for everybody."""
    made = Serve(host="0.0.0.0", port=8000)
    monkeypatch.setattr(run, "serve", made)
    monkeypatch.setattr(run, "_get_global_client", made.context)
    monkeypatch.setattr(run, "_connect", lambda _: False)
    monkeypatch.setattr(run, "_check_model", lambda *_: None)
    monkeypatch.setattr(run, "_app", lambda *_: None)
    monkeypatch.delenv("FLAM_PLAYER_TOKEN", raising=False)
    return made


PLAYED = PlayerSettings(model="model", data="data")


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_cluster_always_gets_a_token(cluster: Serve, monkeypatch: pytest.MonkeyPatch, by_environment: bool) -> None:
    cluster.http = HTTPOptions(host="127.0.0.1", port=8000)
    if by_environment:
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    address = None if by_environment else "head:6379"
    with run.player(PLAYED, Binding(address=address)) as place:
        assert place.token
        assert cluster.applications == {"another", "flam-player"}
    assert cluster.applications == {"another"}
    with run.player(PLAYED, Binding(address=address, no_token=True)) as place:
        assert place.token is None


def test_serve_that_listens_elsewhere_is_left_alone(cluster: Serve) -> None:
    elsewhere = pytest.raises(EnvironmentFault, match=r"listens on 0\.0\.0\.0:8000, not on 127\.0\.0\.1:8000")
    with elsewhere as refused, run.player(PLAYED, Binding(address="head:6379")):
        pass
    assert "serve shutdown" in refused.value.fix
    assert cluster.applications == {"another"}


def test_a_second_player_does_not_take_the_place_of_the_first(cluster: Serve) -> None:
    first = Binding(host="0.0.0.0", address="head:6379")
    with run.player(PLAYED, first):
        with pytest.raises(EnvironmentFault, match="has a player already") as refused, run.player(PLAYED, first):
            pass
        assert "serve.delete('flam-player')" in refused.value.fix
        assert "flam-player" in cluster.applications

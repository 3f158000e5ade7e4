"""A player on a cluster that others use: it asks for a token, and takes nobody's place. Serve is a stand-in here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus

from flam_core.errors import EnvironmentFault
from services.player import run
from services.player.settings import Binding, PlayerSettings
from tests.services.conftest import environment, free_ports, run_job, said
from tests.services.player_fixture import save_small_model, small_grid


class Serve:
    """Ray Serve on a cluster, with what it serves."""

    def __init__(self, **http: Any) -> None:
        self.http, self.applications = HTTPOptions(**http), {"another"}
        self.context = lambda: SimpleNamespace(http_config=self.http, wait_for_proxies_serving=lambda: None)
        self.comes_to, self.message = ApplicationStatus.RUNNING, ""
        self.faults: dict[str, Exception] = {}
        """What is raised, by the method's name."""

    def start(self, **_: Any) -> None:
        """It runs already: options are ignored."""
        self._met("start")

    def status(self) -> Any:
        one = SimpleNamespace(message=self.message)
        found = SimpleNamespace(status=self.comes_to, message="", deployments={"Scenes": one})
        return SimpleNamespace(applications=dict.fromkeys(self.applications, found))

    def RunTarget(self, _: Any, *, name: str, **__: Any) -> str:
        return name

    def run_many(self, targets: list[str], **_: Any) -> None:
        self._met("run_many")
        self.applications |= set(targets)

    def delete(self, name: str) -> None:
        self._met("delete")
        self.applications.remove(name)

    def get_app_handle(self, _: str) -> Any:
        answer = SimpleNamespace(result=lambda timeout_s: self._met("result"))
        return SimpleNamespace(ready=SimpleNamespace(remote=lambda: answer))

    def _met(self, method: str) -> None:
        if method in self.faults:
            raise self.faults[method]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """One that is joined, on whose head Serve listens for everybody."""
    made = Serve(host="0.0.0.0", port=8000)
    monkeypatch.setattr(run, "serve", made)
    monkeypatch.setattr(run, "_get_global_client", made.context)
    monkeypatch.setattr(run, "_connect", lambda *_: False)
    monkeypatch.setattr(run.ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
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


@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"gpus": 1.0}, "2 processes with a model need 2 GPUs in all, and the cluster has 1:", "--gpus"),
        ({"replicas": 4}, "5 processes with a model need 2.6 CPUs in all, and the cluster has 2:", "--replicas"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(cluster: Serve, settings: dict[str, Any], what: str, fix: str) -> None:
    played = PlayerSettings(model="model", data="data", **settings)
    with pytest.raises(EnvironmentFault, match=what) as refused, run.player(played, Binding(address="head:6379")):
        pass
    assert fix in refused.value.fix
    assert cluster.applications == {"another"}


def test_a_ray_of_its_own_has_room_for_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    local: dict[str, Any] = {}
    monkeypatch.setattr(run, "join_or_start", lambda _, given, **__: local.update(given))
    (port,) = free_ports(1)
    for replicas, cpus in ((1, 4), (6, 4), (7, 5), (20, 11)):
        assert run._connect(Binding(port=port), PlayerSettings(model="model", replicas=replicas))
        assert local["num_cpus"] == cpus


@pytest.mark.parametrize(
    ("comes_to", "message", "what"),
    [
        (ApplicationStatus.DEPLOYING, "1 replica takes long to be scheduled.", "not up after 0.3 s.*to be scheduled"),
        (ApplicationStatus.DEPLOY_FAILED, "It failed:\nTraceback\nNo module flam_core", r"It failed: \.\.\. No module"),
    ],
)
def test_processes_that_do_not_come_up_are_not_waited_for_without_end(
    cluster: Serve, monkeypatch: pytest.MonkeyPatch, comes_to: ApplicationStatus, message: str, what: str
) -> None:
    monkeypatch.setattr(run, "_START_SECONDS", 0.3)
    cluster.http = HTTPOptions(host="127.0.0.1", port=8000)
    cluster.comes_to, cluster.message = comes_to, message
    with pytest.raises(EnvironmentFault, match=what) as refused, run.player(PLAYED, Binding(address="head:6379")):
        pass
    assert "installed" in refused.value.fix
    assert cluster.applications == {"another"}


@pytest.mark.parametrize("method", ["start", "run_many", "result"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("what it met"),
        TimeoutError("what it met"),
        RayActorError(error_msg="what it met"),
        RayTaskError("ready", "Traceback:\nwhat it met", ValueError()),
    ],
)
def test_what_ray_meets_is_one_line_with_what_to_do(cluster: Serve, method: str, error: Exception) -> None:
    cluster.http = HTTPOptions(host="127.0.0.1", port=8000)
    cluster.faults = {method: error, "delete": RuntimeError("the cluster is gone")}
    with pytest.raises(EnvironmentFault, match="what it met") as refused, run.player(PLAYED, Binding(address="head:1")):
        pass
    assert "\n" not in str(refused.value)
    assert "logs" in refused.value.fix


@pytest.mark.slow
def test_more_gpus_than_there_are_end_the_program(tmp_path: Path) -> None:
    model, data = save_small_model(tmp_path / "model", 0), small_grid(tmp_path / "grid")
    (port,) = free_ports(1)
    words = ["play", str(model), "--data", str(data), "--port", str(port), "--gpus", "1", "--replicas", "63"]
    done = run_job(words, environment(), tmp_path, seconds=200)
    assert done.returncode == 3, said(done)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("flam: error:")]
    assert "need 64 GPUs in all" in error

"""What the doctor makes of what nodes say."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import pytest

from flam_core.errors import EnvironmentFault
from services.doctor.finding import State, attempt, ok
from services.doctor.node import NodeReport, report, versions, write_read_delete
from services.doctor.nodes import _clocks, _disks, _python, _reach, _shared_memory, _versions
from services.doctor.security import _plain, _token_file


def node(store: float = 1e9) -> dict[str, Any]:
    return {"NodeManagerAddress": "10.0.0.7", "Resources": {"object_store_memory": store}}


def said(**changes: Any) -> NodeReport:
    usual: dict[str, Any] = {
        "host": "worker-7",
        "python": platform.python_version(),
        "versions": versions(),
        "clock": time.time(),
        "shm_bytes": 8 << 30,
        "disk_free": 0.5,
        "disk_free_gb": 100.0,
        "storage": "",
        "tracking": "",
    }
    return NodeReport(**{**usual, **changes})


def test_what_this_machine_says_of_itself_is_well(tmp_path: Path) -> None:
    found = report(str(tmp_path), str(tmp_path / "runs"), f"sqlite:///{tmp_path}/mlflow.db")
    every = [(node(0), found, 0.0)]
    assert found.storage == found.tracking == ""
    assert "missing" not in found.versions.values()
    assert {check(every).state for check in (_python, _versions, _clocks, _shared_memory)} == {State.OK}
    assert list((tmp_path / "runs").iterdir()) == []  # it leaves nothing


@pytest.mark.parametrize(
    ("check", "changes", "skew", "words"),
    [
        (_python, {"python": "2.7.18"}, 0.0, "2.7.18"),
        (_versions, {"versions": {**versions(), "torch": "2.1.0"}}, 0.0, "torch 2.1.0 (here"),
        (_versions, {"versions": {**versions(), "mlflow": "missing"}}, 0.0, "mlflow missing"),
        (_clocks, {}, 40.0, "off by 40 s"),
        (_shared_memory, {"shm_bytes": 64 << 20}, 0.0, "0.1 GB for an object store of 1.0 GB"),
        (_disks, {"disk_free": 0.01, "disk_free_gb": 1.5}, 0.0, "1.5 GB (1%)"),
        (lambda every: _reach(every, "storage", "storage", "s3://b"), {"storage": "no bucket b"}, 0.0, "no bucket b"),
    ],
)
def test_what_a_run_would_suffer_from_is_red(check: Any, changes: dict[str, Any], skew: float, words: str) -> None:
    found = check([(node(), said(), 0.0), (node(), said(**changes), skew)])
    assert found.state == State.RED
    assert words in found.seen
    assert "10.0.0.7 (worker-7)" in found.seen
    assert found.fix


def test_another_patch_release_of_python_is_a_note() -> None:
    here = platform.python_version()
    assert _python([(node(), said(python=here.rpartition(".")[0] + ".99"), 0.0)]).state == State.NOTE


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="file"):
        write_read_delete(str(tmp_path / "file" / "runs"))


def test_an_error_is_a_red_finding_with_its_own_fix() -> None:
    def look() -> Any:
        raise EnvironmentFault("no bucket", fix="Make one.")

    found = attempt("storage", look)
    assert (found.state, found.seen, found.fix) == (State.RED, "no bucket", "Make one.")
    assert attempt("storage", lambda: ok("storage", "fine")).state == State.OK


def test_a_token_that_others_may_read_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "token"
    place.write_text("a" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(place))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    place.chmod(0o644)
    assert _token_file().state == State.RED
    place.chmod(0o600)
    assert _token_file().state == State.OK


@pytest.mark.parametrize(
    ("url", "state"),
    [("http://10.0.0.1:8265", State.NOTE), ("https://mlflow", State.OK), ("http://127.0.0.1:5000", State.OK)],
)
def test_what_is_sent_in_the_clear_is_said(url: str, state: State) -> None:
    assert _plain("password on its way", url).state == state

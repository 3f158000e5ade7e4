"""What a Pushgateway hears of the gate's decision, and what a promotion does without one."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from flam_core.errors import SettingsError
from flam_core.evaluation.stats import Estimate
from services.local.parts import free_ports
from services.registry.announce import PUSHGATEWAY, announce, pushgateway
from services.registry.gate import Decision


def decision(*, promoted: bool, gain: float) -> Decision:
    spread = Estimate(gain, 0.1, gain - 0.2, gain + 0.2, 20)
    return Decision(promoted, "why", "2", "1", "rollout/psnr@10", spread, ())


def values(text: str) -> dict[tuple[str, str], float]:
    """By metric and model; what a Pushgateway says of itself left out."""
    return {
        (sample.name, sample.labels.get("model", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("flam_")
    }


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextmanager
def listening(answer: int) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """A server that takes one push after the other; its address, and (method, path, body) of each."""
    heard: list[tuple[str, str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            heard.append((self.command, self.path, body))
            self.send_response(answer)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", heard
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("promoted", [True, False])
def test_a_decision_is_pushed_whole(promoted: bool) -> None:
    before = time.time()
    with listening(200) as (address, heard):
        assert announce(address, "flam-grid", decision(promoted=promoted, gain=-0.25)) is None
    ((method, path, body),) = heard
    assert method == "PUT", "what was pushed of this model before is replaced, not added to"
    assert path == "/metrics/job/flam-gate/model/flam-grid"
    found = values(body)
    decided = found.pop(("flam_gate_decided_seconds", ""))
    assert before <= decided <= time.time()
    assert found == {("flam_gate_promoted", ""): float(promoted), ("flam_gate_gain", ""): -0.25}


def test_a_gateway_that_is_away_is_said_and_no_error() -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    trouble = announce(address, "flam-grid", decision(promoted=True, gain=1.0))
    assert trouble is not None
    assert address in trouble
    assert PUSHGATEWAY in trouble
    assert "refused" in trouble


def test_a_gateway_that_refuses_is_said_and_no_error() -> None:
    with listening(400) as (address, heard):
        trouble = announce(address, "flam-grid", decision(promoted=True, gain=1.0))
    assert len(heard) == 1
    assert trouble is not None
    assert "400" in trouble


@pytest.mark.parametrize("address", ["pushgateway:9091", "localhost", "ftp://pushgateway"])
def test_what_is_no_address_is_a_settings_error(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv(PUSHGATEWAY, address)
    with pytest.raises(SettingsError, match=f"FLAM_PUSHGATEWAY = {address}"):
        pushgateway()


def test_without_an_address_there_is_no_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PUSHGATEWAY, raising=False)
    assert pushgateway() is None
    monkeypatch.setenv(PUSHGATEWAY, "")
    assert pushgateway() is None
    monkeypatch.setenv(PUSHGATEWAY, "http://pushgateway:9091")
    assert pushgateway() == "http://pushgateway:9091"


@pytest.mark.skipif(
    shutil.which("prometheus-pushgateway") is None, reason="Debian's prometheus-pushgateway is not installed"
)
def test_a_real_pushgateway_shows_the_newest_decision_on_each_model(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    command = ["prometheus-pushgateway", f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log.txt").open("wb") as log:
        server = subprocess.Popen([*command, "--persistence.file="], stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(f"{address}/-/ready", server)
        assert announce(address, "flam-grid", decision(promoted=False, gain=-1.0)) is None
        assert announce(address, "flam-maze", decision(promoted=False, gain=-2.0)) is None
        assert announce(address, "flam-grid", decision(promoted=True, gain=3.0)) is None
        page = requests.get(f"{address}/metrics", timeout=5).text
    finally:
        server.kill()
        server.wait()
    shown = {key: value for key, value in values(page).items() if key[0] != "flam_gate_decided_seconds"}
    assert shown == {
        ("flam_gate_promoted", "flam-grid"): 1.0,
        ("flam_gate_gain", "flam-grid"): 3.0,
        ("flam_gate_promoted", "flam-maze"): 0.0,
        ("flam_gate_gain", "flam-maze"): -2.0,
    }
    assert 'job="flam-gate"' in page


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(requests.RequestException):
            if requests.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"no answer from {url} (exit {server.poll()})")

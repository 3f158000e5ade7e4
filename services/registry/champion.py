"""The aliases of a registered model, and who may move them: one promotion at a time.

MLflow moves an alias for whoever asks last. So a promotion takes a lock first, a tag of the registered model that it
renews while it measures; another that finds it renewed is refused, and one whose holder is gone is taken over.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

import mlflow
from mlflow.exceptions import MlflowException

from flam_core.errors import DataError, EnvironmentFault
from services.registry.gate import Decision
from services.tracking.server import check_server, refusals

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
_LOCK = "flam.promotion"
_RENEW_SECONDS = 5.0
_SETTLE_SECONDS = 1.0
_REFUSED = "Check the server and the credentials."


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    version: str
    run_id: str
    """MLflow's, of the run that trained it."""
    tags: dict[str, str]

    @property
    def address(self) -> str:
        """For `flam_core.load`."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class _Held:
    token: str
    renewed: int


class Champions:
    """The versions of one registered model, by alias.

    Every method raises EnvironmentFault if MLflow does not answer or refuses.
    """

    def __init__(self, tracking_uri: str, name: str) -> None:
        """Raises DataError if there is no such model."""
        check_server(tracking_uri)
        self.name, self._uri = name, tracking_uri
        self._client = mlflow.MlflowClient(tracking_uri)
        try:
            self._client.get_registered_model(name)
        except MlflowException as error:
            raise DataError(
                f"MLflow at {tracking_uri} has no registered model {name}",
                fix="Train one (jobs/train.py), or set MLFLOW_TRACKING_URI.",
            ) from error

    def by_alias(self, alias: str) -> Version | None:
        """None if no version has the alias."""
        try:
            found = self._client.get_model_version_by_alias(self.name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise EnvironmentFault(
                f"MLflow at {self._uri} does not tell the alias {alias}: {str(error).splitlines()[0]}", fix=_REFUSED
            ) from error
        return Version(self.name, str(found.version), str(found.run_id), dict(found.tags))

    def by_version(self, version: str) -> Version:
        """Raises DataError if there is no such version."""
        try:
            found = self._client.get_model_version(self.name, version)
        except MlflowException as error:
            raise DataError(
                f"{self.name} has no version {version}", fix="See MLflow's page for those it has."
            ) from error
        return Version(self.name, str(found.version), str(found.run_id), dict(found.tags))

    def data_of(self, version: Version) -> str:
        """Where the data lay that the version was trained on; empty if its run does not say."""
        with refusals(self._uri, "does not show the version's run", fix=_REFUSED):
            return self._client.get_run(version.run_id).data.tags.get("data", "")

    def promote(self, winner: Version, champion: Version | None) -> None:
        """Make `winner` champion in the place of `champion`, which becomes `previous`. Hold the lock meanwhile.

        Raises EnvironmentFault if the champion is no longer the one that the winner was measured against.
        """
        now = self.by_alias(CHAMPION)
        if (now and now.version) != (champion and champion.version):
            raise EnvironmentFault(
                f"the champion of {self.name} has changed while this was measured: it is "
                f"{'none' if now is None else f'version {now.version}'} now",
                fix="Run the same command again, which measures against that one.",
            )
        with refusals(self._uri, "does not move the aliases", fix=_REFUSED):
            if champion is not None:
                self._client.set_registered_model_alias(self.name, PREVIOUS, champion.version)
            self._client.set_registered_model_alias(self.name, CHAMPION, winner.version)

    def roll_back(self) -> tuple[Version, Version | None]:
        """Make `previous` champion again; it, and who was. What was champion becomes `previous`, so that a second call
        undoes the first. Raises DataError without a `previous`."""
        with self.lock():
            previous, champion = self.by_alias(PREVIOUS), self.by_alias(CHAMPION)
            if previous is None:
                raise DataError(f"{self.name} has no previous champion", fix="Nothing was ever replaced.")
            with refusals(self._uri, "does not move the aliases", fix=_REFUSED):
                self._client.set_registered_model_alias(self.name, CHAMPION, previous.version)
                if champion is not None:
                    self._client.set_registered_model_alias(self.name, PREVIOUS, champion.version)
        return previous, champion

    def record(self, decision: Decision, challenger: Version, content: dict[str, object]) -> str:
        """Keep a decision with the challenger: as an artifact of its run, and in short as tags; the artifact's path."""
        path = f"gate/version-{challenger.version}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
        with refusals(self._uri, "does not keep the decision", fix=_REFUSED):
            self._client.log_text(challenger.run_id, json.dumps(content, indent=1, sort_keys=True) + "\n", path)
            tags = {
                "gate": "promoted" if decision.promoted else "refused",
                "gate.why": decision.why,
                "gate.report": path,
            }
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, challenger.version, key, value)
        return path

    @contextmanager
    def lock(self) -> Iterator[Callable[[], None]]:
        """Be the one who may move the aliases. Raises EnvironmentFault if somebody else is at it.

        What it gives is for just before they are moved: it raises EnvironmentFault if the lock was lost meanwhile.
        """
        mine = _Held(uuid.uuid4().hex, 0)
        before = self._read()
        self._wait_for(before)
        try:
            self._write(mine)
        except EnvironmentFault:
            # The database refuses the second of two who add the lock in the same instant.
            if self._read() not in (None, before):
                self._check(mine, "began at the same moment")
            raise
        time.sleep(_SETTLE_SECONDS)  # of two who take it at the same time, the one who wrote last has it
        self._check(mine, "began at the same moment")
        ended = threading.Event()

        def renew() -> None:
            held = mine
            while not ended.wait(_RENEW_SECONDS):
                held = replace(held, renewed=held.renewed + 1)
                with suppress(EnvironmentFault):  # it is tried again soon, and at the end it is looked at once more
                    now = self._read()
                    if now is None or now.token != mine.token:
                        return
                    self._write(held)

        thread = threading.Thread(target=renew, name="promotion-lock", daemon=True)
        thread.start()
        try:
            yield lambda: self._check(mine, "took over")
        finally:
            ended.set()
            thread.join()
            with suppress(EnvironmentFault):
                now = self._read()
                if now is not None and now.token == mine.token:
                    with refusals(self._uri, "does not drop the lock", fix=_REFUSED):
                        self._client.delete_registered_model_tag(self.name, _LOCK)

    def _wait_for(self, held: _Held | None) -> None:
        """Until the lock is free, or its holder has not renewed it for a while."""
        if held is None:
            return
        deadline = time.monotonic() + 3 * _RENEW_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_SETTLE_SECONDS)
            now = self._read()
            if now is None:
                return
            if now != held:
                raise EnvironmentFault(
                    f"another promotion of {self.name} is under way",
                    fix="Wait for it, then run the same command again.",
                )

    def _check(self, mine: _Held, how: str) -> None:
        now = self._read()
        if now is None or now.token != mine.token:
            raise EnvironmentFault(
                f"another promotion of {self.name} {how}",
                fix="Wait for it, then run the same command again.",
            )

    def _read(self) -> _Held | None:
        with refusals(self._uri, "does not show the lock", fix=_REFUSED):
            text = self._client.get_registered_model(self.name).tags.get(_LOCK)
        try:
            return None if text is None else _Held(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def _write(self, held: _Held) -> None:
        with refusals(self._uri, "does not take the lock", fix=_REFUSED):
            self._client.set_registered_model_tag(self.name, _LOCK, json.dumps(asdict(held)))

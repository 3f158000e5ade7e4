"""Which version an address means now: aliases move, and a server follows them."""

from __future__ import annotations

from flam_core.errors import DataError
from services.registry.champion import Champions, Version


class Followed:
    """A `models:/NAME@ALIAS` or `models:/NAME/VERSION` address of one MLflow server."""

    def __init__(self, address: str, tracking_uri: str) -> None:
        """Raises DataError if there is no such model, EnvironmentFault if MLflow does not answer."""
        self.address = address
        name, self._alias, self._version = _parts(address)
        self._champions = Champions(tracking_uri, name)

    @property
    def moves(self) -> bool:
        """Whether it can mean another version later."""
        return bool(self._alias)

    def now(self) -> Version:
        """The version that it means. Raises DataError if there is none, EnvironmentFault if MLflow does not answer."""
        if not self._alias:
            return self._champions.by_version(self._version)
        found = self._champions.by_alias(self._alias)
        if found is None:
            raise DataError(
                f"{self._champions.name} has no version with the alias {self._alias}",
                fix="Promote one (jobs/promote.py), or name a version.",
            )
        return found


def _parts(address: str) -> tuple[str, str, str]:
    """Name, and alias or version; the other is empty."""
    name = address.removeprefix("models:/")
    if "@" in name:
        name, _, alias = name.partition("@")
        if name and alias:
            return name, alias, ""
    name, _, version = name.partition("/")
    if not name or not version:
        raise DataError(f"{address} names no version", fix=f"Add one: models:/{name or 'NAME'}@champion.")
    return name, "", version

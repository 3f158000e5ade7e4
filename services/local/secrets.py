"""The secrets of a local cluster: made once, readable by their owner alone."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from flam_core.errors import EnvironmentFault

_FILE, _TOKEN = "secrets.json", "ray.token"
_OTHERS = 0o077


@dataclass(frozen=True)
class Secrets:
    """What opens each part."""

    ray_token: str
    mlflow_password: str
    """Of the user `admin`."""
    mlflow_session_key: str
    s3_access_key: str
    s3_secret_key: str

    @staticmethod
    def new() -> Secrets:
        """All of them fresh."""
        key = secrets.token_hex
        return Secrets(key(32), key(24), key(32), key(10).upper(), key(20))


def secrets_of(folder: Path) -> Secrets:
    """Those of the cluster in `folder`, made if there are none; the token also lies in `token_file`.

    Raises EnvironmentFault if others may read them, or if the file is damaged.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = folder / _FILE
    if not place.exists():
        made = Secrets.new()
        write_private(token_file(folder), made.ray_token)
        write_private(place, json.dumps(asdict(made), indent=1))
    for file in (place, token_file(folder)):
        if not file.exists() or file.stat().st_mode & _OTHERS:
            raise EnvironmentFault(
                f"{file} is missing, or others than its owner may read it",
                fix=f"Remove {place}, {token_file(folder)} and {folder}/mlflow/basic_auth.db: new ones are made.",
            )
    try:
        return Secrets(**json.loads(place.read_text()))
    except (ValueError, TypeError) as error:
        raise EnvironmentFault(
            f"{place} is damaged: {error}", fix=f"Remove it and {folder}/mlflow/basic_auth.db: new ones are made."
        ) from error


def token_file(folder: Path) -> Path:
    """Of Ray's token: for RAY_AUTH_TOKEN_PATH. (What Ray itself would make may be read by everybody.)"""
    return folder / _TOKEN


def write_private(place: Path, content: str) -> None:
    """For its owner alone, whole or not at all."""
    part = place.with_suffix(".part")
    part.unlink(missing_ok=True)
    # The mode from the first moment on, not by a chmod afterwards.
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
    part.replace(place)

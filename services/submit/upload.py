"""What a job's working directory would send to the cluster."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes  # Ray has no public name for what it sends

from flam_core.errors import SettingsError

UPLOAD_LIMIT_MIB = 100.0
_NAMED = 5
_MIB = 2**20


def uploaded_files(folder: Path) -> dict[Path, int]:
    """The files that Ray sends for the working directory `folder`, and their bytes before compression.

    Without what `.gitignore` and `.rayignore` name, in any folder, and what Ray never sends (`.git`, `.venv`, …).
    """
    found: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            found[path] = path.stat().st_size

    _dir_travel(
        folder,
        [_get_excludes(folder, get_runtime_env_default_excludes())],
        note,
        include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
        logger=logging.getLogger(__name__),
    )
    return found


def check_upload(folder: Path, limit_mib: float = UPLOAD_LIMIT_MIB) -> float:
    """How many MiB `folder` would send; nothing is sent here.

    Raises SettingsError if it is no folder, or if that is more than `limit_mib`, naming the largest files.
    """
    if not folder.is_dir():
        raise SettingsError(f"--working_dir {folder} is not a folder", fix="Give the folder of the code.")
    files = uploaded_files(folder.resolve())
    total = sum(files.values()) / _MIB
    if total <= limit_mib:
        return total
    largest = sorted(files, key=lambda path: -files[path])[:_NAMED]
    named = ", ".join(f"{path.relative_to(folder.resolve())} ({files[path] / _MIB:.1f} MiB)" for path in largest)
    raise SettingsError(
        f"{folder} would send {total:.1f} MiB to the cluster, and the limit is {limit_mib:g} MiB; the largest of "
        f"{len(files)} files: {named}",
        fix="Name what the job does not need in .rayignore (written like .gitignore); data belong into a bucket.",
    )

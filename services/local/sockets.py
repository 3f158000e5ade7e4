"""Where Ray's sockets and logs lie: Ray makes folders that all may write in, so the one above is its owner's alone."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from flam_core.errors import EnvironmentFault

SHORT = Path("/tmp")
"""Not TMPDIR, which may be long: a socket's path may have 107 bytes, of which Ray takes some 70."""
_OTHERS = 0o077


def ray_folder(folder: Path, below: Path = SHORT) -> Path:
    """For the cluster in `folder`; what is above it is made, or is this user's alone already.

    Raises EnvironmentFault if somebody else has made it, may enter it, or has put a link there.
    """
    private = below / f"flam-{os.geteuid()}"
    try:
        private.mkdir(mode=0o700)
    except FileExistsError:
        found = private.lstat()  # of a link itself, not of where it leads
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & _OTHERS:
            raise EnvironmentFault(
                f"{private} is not a folder of this user's alone",
                fix=f"See who made it, and remove it: ls -ld {private}",
            ) from None
    return private / hashlib.sha256(str(folder).encode()).hexdigest()[:8]

"""Small objects, whole: read, write, ask for, copy to the local disk."""

from __future__ import annotations

from pathlib import Path

from pyarrow.fs import FileType

from flam_core.errors import DataError
from services.storage.faults import storage_fault
from services.storage.location import Location
from services.storage.s3 import RetryingS3


def exists(location: Location) -> bool:
    """Whether an object lies there. Raises EnvironmentFault if the storage does not answer."""
    try:
        if location.local:
            return location.fs.get_file_info(location.path).type == FileType.File
        location.fs.open_input_file(location.path).close()  # one HEAD: `get_file_info` would list what is missing
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise storage_fault(error, location.uri) from error


def read_bytes(location: Location) -> bytes:
    """The content of an object. Raises DataError if it is missing, EnvironmentFault if the storage fails."""
    try:
        with location.fs.open_input_file(location.path) as file:
            return file.read()
    except FileNotFoundError as error:
        raise DataError(f"{location} is missing", fix="Check the address.") from error
    except OSError as error:
        raise storage_fault(error, location.uri) from error


def write_bytes(location: Location, content: bytes) -> None:
    """Write an object so that readers see all of it or nothing. Raises EnvironmentFault if the storage refuses."""
    try:
        if isinstance(location.fs, RetryingS3):  # an object appears when its upload is complete
            location.fs.requests.put(location.path, content)
            return
        folder = location.path.rpartition("/")[0]
        location.fs.create_dir(folder, recursive=True)
        part = f"{location.path}.part"
        with location.fs.open_output_stream(part) as stream:
            stream.write(content)
        location.fs.move(part, location.path)
    except OSError as error:
        raise storage_fault(error, location.uri) from error


def download(location: Location, names: list[str], folder: Path) -> Path:
    """Copy the named objects below `location` into `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(location / name))
    return folder

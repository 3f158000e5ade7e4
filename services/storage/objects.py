"""Small objects, whole: read, write, ask for, copy to the local disk."""

from __future__ import annotations

from pathlib import Path

from pyarrow.fs import FileType

from flam_core.errors import DataError
from services.storage.location import Location, storage_fault


def exists(location: Location) -> bool:
    """Whether an object lies there. Raises EnvironmentFault if the storage does not answer."""
    try:
        return location.fs.get_file_info(location.path).type == FileType.File
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
        if not location.local:  # an object appears when its upload is complete
            with location.fs.open_output_stream(location.path) as stream:
                stream.write(content)
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

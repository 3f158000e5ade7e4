"""From an address to a file system and a path."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from pyarrow.fs import AwsDefaultS3RetryStrategy, FileSystem, FileType, LocalFileSystem, S3FileSystem

from flam_core.errors import EnvironmentFault, SettingsError

_CONNECT_SECONDS = 5.0
_REQUEST_SECONDS = 30.0
_RETRIES = 4
# A first question, so that a storage that hangs is known in seconds.
_CHECK_SECONDS = 5.0
_CHECK_RETRIES = 2

_CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
_AWS_ERROR = re.compile(r"AWS Error \w+(?: \(HTTP status \d+\))?")


def _relax_checksums() -> None:
    """Stores other than AWS refuse the checksums that clients send by default."""
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        for name in _CHECKSUMS:
            os.environ.setdefault(name, "when_required")


_relax_checksums()  # on import too: a worker that unpickles a Location never calls `resolve`


@dataclass(frozen=True)
class Location:
    """A place in a storage. `fs` can be pickled and sent to other processes."""

    fs: FileSystem = field(compare=False)
    path: str
    """As `fs` names it: no scheme, no slash at the end."""
    uri: str
    """As people write it."""

    def __truediv__(self, name: str) -> Location:
        return Location(self.fs, f"{self.path}/{name}", f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def local(self) -> bool:
        """Whether it lies on this host's disk."""
        return self.fs.type_name == "local"


def resolve(address: str | Path, *, check: bool = True) -> Location:
    """The location of a local path or an `s3://bucket/prefix`.

    With `check`, the bucket is asked for once, so that a wrong address or key shows here and not in the middle of a
    run. Raises SettingsError for an address that is neither, EnvironmentFault if the bucket does not answer, does not
    exist or forbids.
    """
    text = str(address).rstrip("/")
    scheme, separator, rest = text.partition("://")
    if not separator:
        path = str(Path(text).expanduser().absolute())
        return Location(LocalFileSystem(), path, path)
    if scheme == "file":
        return Location(LocalFileSystem(), rest, rest)
    if scheme != "s3" or not rest:
        raise SettingsError(f"{text} is not an address flam can use", fix="Give a path or s3://bucket/prefix.")
    location = Location(_s3(), rest, text)
    if check:
        _check_bucket(location)
    return location


def _s3(request_seconds: float = _REQUEST_SECONDS, retries: int = _RETRIES) -> S3FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options = {}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        _relax_checksums()
        options = {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    return S3FileSystem(
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=request_seconds,
        retry_strategy=AwsDefaultS3RetryStrategy(max_attempts=retries),  # the first try is not counted
        allow_bucket_creation=False,
        **options,
    )


def _check_bucket(location: Location) -> None:
    try:
        found = _s3(_CHECK_SECONDS, _CHECK_RETRIES).get_file_info(_bucket(location.uri)).type
    except OSError as error:
        raise storage_fault(error, location.uri) from error
    if found == FileType.NotFound:
        raise _no_bucket(location.uri)


def storage_fault(error: OSError, uri: str) -> EnvironmentFault:
    """What a storage's refusal means, in one line."""
    text = " ".join(str(error).split())
    if not uri.startswith("s3://"):
        return EnvironmentFault(f"cannot use {uri}: {text}", fix="Check access and free space.")
    # Only the store's code counts: names of keys, ports and request ids hold words and numbers of all kinds.
    found = _AWS_ERROR.search(text)
    reason = (found[0] if found else text).upper()
    if any(word in reason for word in ("ACCESS_DENIED", "FORBIDDEN", "403", "SIGNATURE", "INVALID_ACCESS_KEY")):
        return EnvironmentFault(
            f"{_endpoint()} forbids access to {uri}",
            fix="Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy.",
        )
    if "NO_SUCH_BUCKET" in reason:
        return _no_bucket(uri)
    if any(word in reason for word in ("NETWORK_CONNECTION", "TIMEOUT")):
        return EnvironmentFault(
            f"{_endpoint()} cannot be reached for {uri}", fix="Is it up? Check AWS_ENDPOINT_URL and the network."
        )
    if "HTTP STATUS 411" in reason:
        return EnvironmentFault(
            f"{_endpoint()} refuses the checksums sent with {uri}",
            fix=f"Set {' and '.join(_CHECKSUMS)} to when_required, on every node.",
        )
    return EnvironmentFault(f"{_endpoint()} does not serve {uri}: {text}", fix="Check the address and the storage.")


def _no_bucket(uri: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"bucket {_bucket(uri)} of {uri} does not exist at {_endpoint()}",
        fix="Create it, or correct the address or AWS_ENDPOINT_URL.",
    )


def _bucket(uri: str) -> str:
    return uri.removeprefix("s3://").split("/", 1)[0]


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS S3"

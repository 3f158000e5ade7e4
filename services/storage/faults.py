"""What a storage's refusals mean: whether to ask again, and what to tell people."""

from __future__ import annotations

import os
import re

from flam_core.errors import EnvironmentFault

CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
RETRY_SECONDS = "FLAM_STORAGE_RETRY_SECONDS"

_AWS_ERROR = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))?")
_CURL_CODE = re.compile(r"curlCode: (\d+)")
_TRIES = re.compile(r" after \d+ tr(?:y|ies) in [\d.]+ s$")

_THROTTLED = ("SLOW_DOWN", "THROTTL", "SERVICE_UNAVAILABLE", "BANDWIDTH", "REQUEST_LIMIT", "TOO_MANY")
_SERVER = ("INTERNAL_FAILURE", "INTERNAL_ERROR")
_FORBIDDEN = ("ACCESS_DENIED", "FORBIDDEN", "SIGNATURE", "INVALID_ACCESS_KEY")
_MISSING = ("NO_SUCH_KEY", "RESOURCE_NOT_FOUND")
_CURL_KINDS = {"18": "cut", "28": "timeout"}
_CURL_CERTIFICATE = "60"


class GaveUp(OSError):
    """A request that was tried until its time was over. Its text is the last answer and how often, how long."""


class ShortRead(OSError):
    """Fewer bytes came than the object has."""


def retry_kind(error: BaseException) -> str | None:
    """Why asking again may help, one of `counters.RETRY_KINDS`; None where it does not.

    Throttled: 429 and 503 (without the answer's text, a 503 for overload looks like any other). Server: other 5xx.
    Timeout. Connection: refused, reset, no such host. Cut: a body that ends early. Denied: 403, which some stores
    answer when they are overloaded, so that it *may* help, where it worked before; a bad signature or an unknown key
    never does. What is missing stays missing.
    """
    if isinstance(error, ShortRead):
        return "cut"
    if not isinstance(error, OSError) or isinstance(error, GaveUp | FileNotFoundError):
        return None
    text = str(error)
    code, status = _code_and_status(text)
    if any(word in code for word in _THROTTLED) or status in ("429", "503"):
        return "throttled"
    if any(word in code for word in _SERVER) or status.startswith("5"):
        return "server"
    if "TIMEOUT" in code or status == "408":
        return "timeout"
    if code == "NETWORK_CONNECTION":
        curl = _CURL_CODE.search(text)
        number = curl[1] if curl else ""
        return None if number == _CURL_CERTIFICATE else _CURL_KINDS.get(number, "connection")
    if code == "NO_SUCH_UPLOAD":  # the answer to an upload's last request was lost, and it was sent again
        return "cut"
    if code == "ACCESS_DENIED":
        return "denied"
    return None


def is_missing(error: OSError) -> bool:
    """Whether the object is not there."""
    code, status = _code_and_status(str(error))
    return isinstance(error, FileNotFoundError) or code in _MISSING or (status == "404" and code == "UNKNOWN")


def storage_fault(error: OSError, uri: str) -> EnvironmentFault:
    """What a storage's refusal means, in one line."""
    text = " ".join(str(error).split())
    if not uri.startswith("s3://"):
        return EnvironmentFault(f"cannot use {uri}: {text}", fix="Check access and free space.")
    tried = _TRIES.search(text)
    tries = tried[0] if tried else ""
    # Only the store's code counts: names of keys, ports and request ids hold words and numbers of all kinds.
    code, status = _code_and_status(text)
    if any(word in code for word in _FORBIDDEN) or status == "403":
        return EnvironmentFault(
            f"{endpoint()} forbids access to {uri}",
            fix="Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy.",
        )
    if code == "NO_SUCH_BUCKET":
        return no_bucket(uri)
    kind = retry_kind(OSError(text))
    if kind in ("connection", "timeout", "cut") or code == "NETWORK_CONNECTION":
        return EnvironmentFault(
            f"{endpoint()} cannot be reached for {uri}{tries}", fix="Is it up? Check AWS_ENDPOINT_URL and the network."
        )
    if kind in ("throttled", "server"):
        answer = " ".join(part for part in (status, code if code != "UNKNOWN" else "") if part)
        return EnvironmentFault(
            f"{endpoint()} answers {answer} for {uri}{tries}",
            fix=f"It is overloaded or failing: try later or with fewer workers, or raise {RETRY_SECONDS}.",
        )
    if status == "411":
        return EnvironmentFault(
            f"{endpoint()} refuses the checksums sent with {uri}",
            fix=f"Set {' and '.join(CHECKSUMS)} to when_required, on every node.",
        )
    return EnvironmentFault(f"{endpoint()} does not serve {uri}: {text}", fix="Check the address and the storage.")


def no_bucket(uri: str) -> EnvironmentFault:
    """That the bucket of `uri` does not exist."""
    return EnvironmentFault(
        f"bucket {bucket_of(uri)} of {uri} does not exist at {endpoint()}",
        fix="Create it, or correct the address or AWS_ENDPOINT_URL.",
    )


def bucket_of(uri: str) -> str:
    """The bucket of an `s3://` address or of a path without the scheme."""
    return uri.removeprefix("s3://").split("/", 1)[0]


def endpoint() -> str:
    """The store, as people know it."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS S3"


def _code_and_status(text: str) -> tuple[str, str]:
    """The store's code, in capitals, and the HTTP status; each empty if the text has none."""
    found = _AWS_ERROR.search(text)
    return (found[1].upper(), found[2] or "") if found else ("", "")

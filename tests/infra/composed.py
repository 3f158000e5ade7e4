"""What every service of a compose file must keep, as functions that say what does not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Document = dict[str, Any]

_DIGEST = re.compile(r"\S+@sha256:[0-9a-f]{64}")
_SECRET = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|PRIVATE|SESSION_KEY|(ACCESS|API)[_-]?KEY", re.IGNORECASE)
_REQUIRED = re.compile(r"\$\{([A-Z_0-9]+):\?[^}]+\}")
_PUBLISHED = re.compile(r"127\.0\.0\.1:\d+:\d+")
_SOURCE = re.compile(r"(?P<source>[^:]+):[^:]+(:ro)?")


def required(document: Document) -> set[str]:
    """Variables without which nothing starts."""
    return set(_REQUIRED.findall(str(document["services"])))


def faults(document: Document) -> list[str]:
    """What is wrong, by service."""
    return [f"{name}: {said}" for name, one in document["services"].items() for said in _of(one, document)]


def _of(service: Document, document: Document) -> Iterator[str]:
    build = service.get("build")
    if build is None and not _DIGEST.fullmatch(service["image"]):
        yield f"image {service['image']} is not by digest"
    if build is not None and build["dockerfile"] != "infra/docker/Dockerfile":
        yield f"is not built by infra/docker/Dockerfile but by {build['dockerfile']}"
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", str(service.get("user"))):
        yield "user is not the number of another than root"
    if service.get("read_only") is not True:
        yield "its root file system can be written"
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add"):
        yield "has capabilities"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "can gain privileges"
    if service.get("privileged") or service.get("network_mode") or service.get("pid"):
        yield "shares what is the machine's"
    if service.get("restart") != "no" and "test" not in service.get("healthcheck", {}):
        yield "has no health check"
    yield from _of_environment(service.get("environment", {}))
    yield from (
        f"port {one} is open to others" for one in service.get("ports", []) if not _PUBLISHED.fullmatch(str(one))
    )
    for one in service.get("volumes", []):
        place = _SOURCE.fullmatch(one)
        if place is None or (place["source"].startswith((".", "/")) and not one.endswith(":ro")):
            yield f"volume {one} writes into the machine's files"
        elif not place["source"].startswith(".") and place["source"] not in document["volumes"]:
            yield f"volume {one} is none of the project's"


def _of_environment(variables: dict[str, Any]) -> Iterator[str]:
    for name, value in variables.items():
        if _SECRET.search(name) and not (str(value).startswith("/") or _REQUIRED.fullmatch(str(value))):
            yield f"{name} is written down"
        if re.search(r"://[^/\s:@]*:[^/\s@]+@", str(value)):
            yield f"{name} has a password in its address"

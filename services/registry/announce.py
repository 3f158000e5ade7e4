"""What the gate decided, for Prometheus: a promotion is over before anyone could ask it, so it is pushed."""

from __future__ import annotations

import os
import time

from prometheus_client import CollectorRegistry, Gauge, push_to_gateway

from flam_core.errors import SettingsError
from services.registry.gate import Decision

PUSHGATEWAY = "FLAM_PUSHGATEWAY"
"""Environment variable with the address of a Prometheus Pushgateway, such as http://pushgateway:9091."""
_JOB = "flam-gate"
_SECONDS = 5.0


def pushgateway() -> str | None:
    """Its address; None if there is none. Raises SettingsError if that is no address."""
    address = os.environ.get(PUSHGATEWAY)
    if address and not address.startswith(("http://", "https://")):
        raise SettingsError(f"{PUSHGATEWAY} = {address}", fix="Give an address such as http://pushgateway:9091.")
    return address or None


def announce(address: str, model: str, decision: Decision) -> str | None:
    """Push the newest decision on a model; what went wrong, if it did: the decision stands all the same.

    Prometheus then has, by `model`, `flam_gate_promoted` (1, or 0 if the challenger was refused), `flam_gate_gain` (of
    the main metric, over the champion) and `flam_gate_decided_seconds` (Unix time).
    """
    registry = CollectorRegistry()
    values = {
        "flam_gate_promoted": (float(decision.promoted), "1 if the newest challenger became champion, else 0"),
        "flam_gate_gain": (decision.gain.mean, "its gain in the main metric over the champion"),
        "flam_gate_decided_seconds": (time.time(), "when that was decided, Unix time"),
    }
    for name, (value, said) in values.items():
        Gauge(name, said, registry=registry).set(value)
    try:
        push_to_gateway(address, job=_JOB, registry=registry, timeout=_SECONDS, grouping_key={"model": model})
    except (OSError, ValueError) as error:  # urllib's errors are OSErrors
        return f"the decision was not pushed to {address} ({PUSHGATEWAY}): {error}"
    return None

"""The rendered manifests, and how tests find things in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
KUBERAY = REPOSITORY / "infra" / "kuberay"
OVERLAYS = ("small", "large")
KUBERNETES = "1.34"
"""The version whose schemas core kinds are checked by."""

Document = dict[str, Any]


def one(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def cluster(documents: list[Document]) -> Document:
    return one(documents, "RayCluster", "flam")["spec"]


def container_of(group: Document) -> Document:
    """Ray's container of a group of nodes."""
    return group["template"]["spec"]["containers"][0]

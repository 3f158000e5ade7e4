"""Who reaches whom under the network policies of both overlays."""

from __future__ import annotations

import copy

from tests.infra.manifests import Document
from tests.infra.rules import OUTSIDE, allowed

PARTS = {
    "head": {"flam-part": "ray", "flam-node": "head"},
    "worker": {"flam-part": "ray", "flam-node": "gpu"},
    "submitter": {"flam-part": "submitter"},
    "mlflow": {"flam-part": "mlflow"},
    "postgresql": {"flam-part": "postgresql"},
    "prometheus": {"flam-part": "prometheus"},
    "pushgateway": {"flam-part": "pushgateway"},
    "grafana": {"flam-part": "grafana"},
    "operator": {"app.kubernetes.io/name": "kuberay-operator", "elsewhere": "yes"},
    "stranger": {"elsewhere": "yes"},
    "outside": OUTSIDE,
}
PORTS = (80, 443, 3000, 5000, 5432, 6379, 6443, 8080, 8265, 9090, 9091, 10001)
ALL_PORTS = {(source, target, port) for source in ("head", "worker") for target in ("head", "worker") for port in PORTS}
OPEN = ALL_PORTS | {
    ("head", "mlflow", 5000),
    ("worker", "mlflow", 5000),
    ("mlflow", "postgresql", 5432),
    ("submitter", "head", 8265),
    ("operator", "head", 8265),
    ("head", "outside", 443),
    ("worker", "outside", 443),
    ("mlflow", "outside", 443),
    ("head", "outside", 6443),
    ("prometheus", "head", 8080),
    ("prometheus", "worker", 8080),
    ("head", "pushgateway", 9091),
    ("worker", "pushgateway", 9091),
    ("prometheus", "pushgateway", 9091),
    ("grafana", "prometheus", 9090),
}


def reachable(documents: list[Document]) -> set[tuple[str, str, int]]:
    return {
        (source, target, port)
        for source, from_labels in PARTS.items()
        for target, to_labels in PARTS.items()
        for port in PORTS
        if not {source, target} & {"operator", "stranger", "outside"} or _crosses(source, target)
        if (_passes_from(source, documents, from_labels, to_labels, port))
    }


def _crosses(source: str, target: str) -> bool:
    """Of pairs with one end outside the namespace: in from pods elsewhere, out to addresses."""
    elsewhere = {"operator", "stranger"}
    return (source in elsewhere and target not in elsewhere | {"outside"}) or (
        target == "outside" and source not in elsewhere | {"outside"}
    )


def _passes_from(source: str, documents: list[Document], a: Document, b: Document, port: int) -> bool:
    mine = documents
    if source in ("operator", "stranger"):  # policies of this namespace do not bind those who send from another
        mine = copy.deepcopy([each for each in documents if each["kind"] == "NetworkPolicy"])
        for each in mine:
            each["spec"]["policyTypes"] = [way for way in each["spec"]["policyTypes"] if way != "Egress"]
    return allowed(mine, a, b, port)


def test_only_these_reach_one_another(documents: list[Document]) -> None:
    assert reachable(documents) == OPEN


def test_without_a_default_all_is_open(documents: list[Document]) -> None:
    left = [each for each in documents if each["metadata"]["name"] != "default-deny"]
    assert ("stranger", "grafana", 3000) in reachable(left) or ("stranger", "submitter", 80) in reachable(left)

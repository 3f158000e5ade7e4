"""Who reaches whom under the network policies of both overlays."""

from __future__ import annotations

from tests.infra.manifests import Document
from tests.infra.rules import METADATA, NODE_DNS, OUTSIDE, allowed

PARTS = {
    "head": {"flam-part": "ray", "flam-node": "head"},
    "worker": {"flam-part": "ray", "flam-node": "gpu"},
    "submitter": {"flam-part": "submitter"},
    "mlflow": {"flam-part": "mlflow"},
    "postgresql": {"flam-part": "postgresql"},
    "prometheus": {"flam-part": "prometheus"},
    "pushgateway": {"flam-part": "pushgateway"},
    "grafana": {"flam-part": "grafana"},
    "operator": {"app.kubernetes.io/name": "kuberay-operator", "elsewhere": "operators"},
    "operator-kustomized": {
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/component": "kuberay-operator",
        "elsewhere": "ray-system",
    },
    "stranger": {"elsewhere": "strangers"},
    "dns": {"k8s-app": "kube-dns", "elsewhere": "kube-system"},
    "node-dns": NODE_DNS,
    "metadata": METADATA,
    "outside": OUTSIDE,
}
ELSEWHERE = {name for name, labels in PARTS.items() if "elsewhere" in labels}
ADDRESSES = {name for name, labels in PARTS.items() if "address" in labels}
OURS = set(PARTS) - ELSEWHERE - ADDRESSES
PORTS = (53, 80, 443, 3000, 5000, 5432, 6379, 6443, 8080, 8265, 9090, 9091, 10001, 44217, 44227)
ALL_PORTS = {(source, target, port) for source in ("head", "worker") for target in ("head", "worker") for port in PORTS}
OPEN = ALL_PORTS | {
    ("head", "mlflow", 5000),
    ("worker", "mlflow", 5000),
    ("mlflow", "postgresql", 5432),
    ("submitter", "head", 8265),
    ("operator", "head", 8265),
    ("operator-kustomized", "head", 8265),
    *((name, target, 53) for name in OURS for target in ("dns", "node-dns")),
    ("head", "outside", 443),
    ("worker", "outside", 443),
    ("mlflow", "outside", 443),
    ("head", "outside", 6443),
    ("prometheus", "head", 8080),
    ("prometheus", "worker", 8080),
    ("prometheus", "head", 44217),
    ("prometheus", "head", 44227),
    ("head", "prometheus", 9090),
    ("head", "grafana", 3000),
    ("head", "pushgateway", 9091),
    ("worker", "pushgateway", 9091),
    ("prometheus", "pushgateway", 9091),
    ("grafana", "prometheus", 9090),
}


def reachable(documents: list[Document], protocol: str = "TCP") -> set[tuple[str, str, int]]:
    return {
        (source, target, port)
        for source in PARTS
        for target in PARTS
        for port in PORTS
        if source in OURS or (source in ELSEWHERE and target in OURS)
        if allowed(_bind(source, documents), PARTS[source], PARTS[target], port, protocol)
    }


def _bind(source: str, documents: list[Document]) -> list[Document]:
    """The policies that hold for who sends: those of this namespace do not bind who sends from another."""
    policies = [each for each in documents if each["kind"] == "NetworkPolicy"]
    if source in OURS:
        return policies
    return [
        {
            **each,
            "spec": {**each["spec"], "policyTypes": [one for one in each["spec"]["policyTypes"] if one != "Egress"]},
        }
        for each in policies
    ]


def test_only_these_reach_one_another(documents: list[Document]) -> None:
    assert reachable(documents) == OPEN


def test_dns_is_what_all_reach_by_udp(documents: list[Document]) -> None:
    """But for what Ray's pods have among themselves."""
    rays = {(source, target, port) for source, target, port in ALL_PORTS if port != 53}
    wanted = {(name, target, 53) for name in OURS for target in ("dns", "node-dns")}
    found = reachable(documents, "UDP")
    assert found - ALL_PORTS == wanted
    assert rays <= found


def test_without_dns_nothing_finds_anything(documents: list[Document]) -> None:
    left = [each for each in documents if each["metadata"]["name"] != "dns"]
    assert not {one for one in reachable(left, "UDP") if one[1] in ("dns", "node-dns")}
    assert reachable(left) != OPEN


def test_without_a_default_all_is_open(documents: list[Document]) -> None:
    left = [each for each in documents if each["metadata"]["name"] != "default-deny"]
    assert ("stranger", "grafana", 3000) in reachable(left) or ("stranger", "submitter", 80) in reachable(left)

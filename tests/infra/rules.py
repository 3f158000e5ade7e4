"""What every pod of flam's manifests must keep, as functions that say what does not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

Document = dict[str, Any]

PLACEHOLDER = "sha256:set-me"
"""No digest at all, so that Kubernetes names the image as invalid: whoever deploys sets the one that was pushed."""
SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|PRIVATE|(ACCESS|API)[_-]?KEY", re.IGNORECASE)
_SECRET_IN_ADDRESS = re.compile(r"://[^/\s:@]*:(?!\$\([A-Z_]+\)@)[^/\s@]+@")
_PATH_OR_SWITCH = re.compile(r"true|false|/\S*")
_DIGEST = re.compile(r"\S+@sha256:(?!0{64})([0-9a-f]{64}|set-me)")


@dataclass(frozen=True)
class Pod:
    """A pod that the manifests bring about."""

    owner: str
    """Kind, name and place of its template."""
    labels: Mapping[str, str]
    spec: dict[str, Any]
    lasting: bool = True
    """Whether it runs for long, and so needs probes."""
    head: bool = False
    sidecars: tuple[dict[str, Any], ...] = field(default=())
    """Containers that an operator adds, as far as the manifests say what they are like."""

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All that the manifests name."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"], *self.sidecars]


def pods(documents: list[Document]) -> list[Pod]:
    """All pods of all kinds."""
    found: list[Pod] = []
    for one in documents:
        name = f"{one['kind']} {one['metadata']['name']}"
        spec = one.get("spec", {})
        if one["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            found.append(_pod(name, spec["template"], lasting=one["kind"] != "Job"))
        elif one["kind"] == "Pod":
            found.append(_pod(name, one))
        elif one["kind"] == "CronJob":
            found.append(_pod(name, spec["jobTemplate"]["spec"]["template"], lasting=False))
        elif one["kind"] == "RayCluster":
            found += _ray_pods(name, spec)
        elif one["kind"] == "RayJob":
            found += _ray_pods(name, spec["rayClusterSpec"])
            found.append(_pod(f"{name} submitter", spec["submitterPodTemplate"], lasting=False))
    return found


def _ray_pods(name: str, spec: dict[str, Any]) -> list[Pod]:
    head = spec["headGroupSpec"]["template"]
    autoscaler = {"name": "autoscaler", **spec.get("autoscalerOptions", {})}
    sidecars = (autoscaler,) if spec.get("enableInTreeAutoscaling") else ()
    found = [_pod(f"{name} head", head, head=True, sidecars=sidecars)]
    for group in spec.get("workerGroupSpecs", []):
        found.append(_pod(f"{name} {group['groupName']}", group["template"]))
    return found


def _pod(owner: str, template: dict[str, Any], **more: Any) -> Pod:
    return Pod(owner, template.get("metadata", {}).get("labels", {}), template["spec"], **more)


def broken(documents: list[Document]) -> list[str]:
    """All that breaks a rule, as `rule: who: what`."""
    found = [complaint for pod in pods(documents) for complaint in _of_pod(pod)]
    return found + [complaint for one in documents for complaint in _of_document(one)]


def _of_pod(pod: Pod) -> Iterator[str]:
    spec, above = pod.spec, pod.spec.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"host: {pod.owner}: {name}"
    if not spec.get("serviceAccountName"):
        yield f"account: {pod.owner}: no account of its own"
    if spec.get("automountServiceAccountToken") is not pod.head:
        yield f"account: {pod.owner}: automountServiceAccountToken must be {pod.head}"
    volumes = {one["name"]: one for one in spec.get("volumes", [])}
    for one in volumes.values():
        if "hostPath" in one:
            yield f"host: {pod.owner}: volume {one['name']} is the node's"
        if "emptyDir" in one and "sizeLimit" not in one["emptyDir"]:
            yield f"resources: {pod.owner}: volume {one['name']} may fill the node"
    if (room := _disk(pod)) > (limit := _ephemeral(pod)):
        yield f"resources: {pod.owner}: volumes of {room} bytes on disk, and evicted at {limit}"
    for container in pod.containers:
        who = f"{pod.owner}: {container['name']}"
        sidecar = container in pod.sidecars
        yield from _of_security(who, container, above)
        # A sidecar without an image gets the head's from the operator.
        named = "image" in container or not sidecar
        if named and not _DIGEST.fullmatch(container.get("image", "")):
            yield f"image: {who}: {container.get('image')} has no digest"
        resources = container.get("resources", {})
        for kind in ("requests", "limits"):
            for what in ("cpu", "memory", "ephemeral-storage"):
                if what not in resources.get(kind, {}):
                    yield f"resources: {who}: no {kind} of {what}"
        if pod.lasting and not sidecar and container in spec["containers"]:
            for probe in ("livenessProbe", "readinessProbe"):
                if probe not in container:
                    yield f"probe: {who}: no {probe}"
        mounts = {one["mountPath"]: volumes.get(one["name"], {}) for one in container.get("volumeMounts", [])}
        if "emptyDir" not in mounts.get("/tmp", {}):
            yield f"written: {who}: /tmp is no emptyDir"
        if pod.labels.get("flam-part") == "ray" and "emptyDir" not in mounts.get("/tmp/ray", {}):
            yield f"written: {who}: /tmp/ray is not named, and the operator adds one without a size"
        if mounts.get("/dev/shm", {}).get("emptyDir", {}).get("medium") != "Memory":
            yield f"written: {who}: /dev/shm is no memory"
        yield from _secrets(who, container)


def _disk(pod: Pod) -> int:
    """What the pod's volumes may take of the node's disk, in bytes."""
    volumes = [one.get("emptyDir", {}) for one in pod.spec.get("volumes", [])]
    return sum(size(one.get("sizeLimit", "0Gi")) for one in volumes if one.get("medium") != "Memory")


def _ephemeral(pod: Pod) -> int:
    """At which the pod is evicted: what its containers may write together, those that begin it left out."""
    limits = [one.get("resources", {}).get("limits", {}) for one in (*pod.spec["containers"], *pod.sidecars)]
    return sum(size(one.get("ephemeral-storage", "0Gi")) for one in limits)


def size(quantity: str) -> int:
    """Bytes of a quantity as the manifests write it."""
    match = re.fullmatch(r"(\d+)(Mi|Gi)", quantity)
    if match is None:
        raise ValueError(f"{quantity} is no whole number of Mi or Gi")
    return int(match[1]) << {"Mi": 20, "Gi": 30}[match[2]]


def _of_security(who: str, container: dict[str, Any], above: dict[str, Any]) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = {**above, **own}
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield f"root: {who}: may run as root"
    if own.get("readOnlyRootFilesystem") is not True:
        yield f"read-only: {who}: its root file system can be written"
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield f"privileges: {who}: may gain privileges"
    capabilities = own.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield f"privileges: {who}: keeps capabilities"
    if both.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"seccomp: {who}: not RuntimeDefault"


def _secrets(who: str, container: dict[str, Any]) -> Iterator[str]:
    for one in container.get("env", []):
        value = str(one.get("value", ""))
        secret = SECRET_NAME.search(one["name"]) and not one["name"].endswith(("_PATH", "_FILE"))
        if "value" in one and secret and not _PATH_OR_SWITCH.fullmatch(value):
            yield f"secret: {who}: {one['name']} is in the manifest"
        if _SECRET_IN_ADDRESS.search(value):
            yield f"secret: {who}: {one['name']} has a password in its address"
    for word in [*container.get("command", []), *container.get("args", [])]:
        given = [*re.findall(r"\$\(([A-Za-z_]+)\)", word), *re.findall(r"^--([a-z_-]+)=", word)]
        if _SECRET_IN_ADDRESS.search(word) or any(SECRET_NAME.search(name) for name in given):
            yield f"secret: {who}: a secret is on its command line"


def _of_document(one: Document) -> Iterator[str]:
    who = f"{one['kind']} {one['metadata']['name']}"
    spec = one.get("spec", {})
    if one["kind"] == "Secret":
        yield f"secret: {who}: secrets are made by who deploys"
    if one["kind"] == "Service" and spec.get("type", "ClusterIP") != "ClusterIP":
        yield f"network: {who}: {spec['type']} is reachable from outside"
    if one["kind"] == "RayJob" and "runtimeEnvYAML" in spec:
        yield f"secret: {who}: a job's runtime environment is shown in the dashboard"
    cluster = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec", {})}.get(one["kind"])
    if cluster is not None and cluster.get("authOptions", {}).get("mode") != "token":
        yield f"token: {who}: Ray takes jobs from everyone"
    if one["kind"] == "NetworkPolicy":
        for rule in spec.get("ingress", []):
            if not rule.get("from") or any("ipBlock" in peer for peer in rule["from"]):
                yield f"network: {who}: lets in whoever comes"
        for rule in spec.get("egress", []):
            if not rule.get("to"):
                yield f"network: {who}: lets out to everywhere"
            for peer in rule.get("to", []):
                if "ipBlock" in peer and _has_metadata(peer["ipBlock"]):
                    yield f"network: {who}: reaches the cloud's metadata"
                if "ipBlock" in peer and not rule.get("ports"):
                    yield f"network: {who}: all ports of all addresses"


def _has_metadata(block: dict[str, Any]) -> bool:
    """Whether a block has more of the link-local addresses than the one where NodeLocal DNSCache listens."""
    network = ip_network(block["cidr"])
    return (
        network.overlaps(_LINK_LOCAL)
        and network != ip_network(f"{NODE_DNS['address']}/32")
        and str(_LINK_LOCAL) not in block.get("except", [])
    )


_LINK_LOCAL = ip_network("169.254.0.0/16")
OUTSIDE = {"address": "203.0.113.1"}
"""Instead of labels: an address outside the cluster."""
NODE_DNS = {"address": "169.254.20.10"}
"""Where NodeLocal DNSCache listens, on each node."""
METADATA = {"address": "169.254.169.254"}
"""Where a cloud hands out its nodes' rights."""


def allowed(
    documents: list[Document], source: Mapping[str, str], target: Mapping[str, str], port: int, protocol: str = "TCP"
) -> bool:
    """Whether the network policies let a pod of these labels reach another one (or an address) at a port."""
    bound = "address" not in target and "elsewhere" not in target  # policies here bind pods of this namespace alone
    return _passes(documents, "Egress", source, target, (protocol, port)) and (
        not bound or _passes(documents, "Ingress", target, source, (protocol, port))
    )


def _passes(
    documents: list[Document], way: str, pod: Mapping[str, str], peer: Mapping[str, str], port: tuple[str, int]
) -> bool:
    rules_key, peers_key = ("egress", "to") if way == "Egress" else ("ingress", "from")
    policies = [
        one["spec"]
        for one in documents
        if one["kind"] == "NetworkPolicy" and way in one["spec"]["policyTypes"] and _selects(one["spec"], pod)
    ]
    if not policies:
        return True  # Kubernetes: a pod that no policy selects is open
    return any(
        any(_is_peer(one, peer) for one in rule[peers_key])
        and (not rule.get("ports") or any((one["protocol"], one["port"]) == port for one in rule["ports"]))
        for policy in policies
        for rule in policy.get(rules_key, [])
    )


def _selects(spec: dict[str, Any], labels: Mapping[str, str]) -> bool:
    selector = spec["podSelector"]
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        one["operator"] == "In" and labels.get(one["key"]) in one["values"]
        for one in selector.get("matchExpressions", [])
    )


def _is_peer(peer: dict[str, Any], labels: Mapping[str, str]) -> bool:
    if "ipBlock" in peer:
        return "address" in labels and _in_block(peer["ipBlock"], labels["address"])
    # Pods of other namespaces are told apart by a label of their own here, which names the namespace.
    if ("namespaceSelector" in peer) != ("elsewhere" in labels) or "address" in labels:
        return False
    named = peer.get("namespaceSelector", {}).get("matchLabels", {})
    return all(each == ("kubernetes.io/metadata.name", labels["elsewhere"]) for each in named.items()) and _selects(
        peer, labels
    )


def _in_block(block: dict[str, Any], address: str) -> bool:
    found = ip_address(address)
    return found in ip_network(block["cidr"]) and not any(found in ip_network(one) for one in block.get("except", []))

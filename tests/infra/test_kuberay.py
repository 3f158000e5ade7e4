"""The manifests of both overlays: valid by the schemas of KubeRay and Kubernetes, closed, and free of secrets."""

from __future__ import annotations

import copy
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.kustomize import kustomize_command, render, render_plainly
from tests.infra.rules import OUTSIDE, PLACEHOLDER, Pod, allowed, broken, pods
from tests.infra.schemas import errors, ray_schemas

REPOSITORY = Path(__file__).resolve().parents[2]
KUBERAY = REPOSITORY / "infra" / "kuberay"
OVERLAYS = ("small", "large")
KUBERNETES = "1.34"
"""The version whose schemas core kinds are checked by."""

Document = dict[str, Any]


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Document]]:
    """Both overlays, rendered; tests must not change them."""
    return {name: render(KUBERAY / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """KubeRay's, strict."""
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS names no folder with KubeRay's schemas (ray.io_*.yaml of a release)")
    found = ray_schemas(REPOSITORY / folder)
    assert {"RayCluster", "RayJob"} <= set(found), f"no schemas in {folder}"
    return found


@pytest.fixture(params=OVERLAYS)
def documents(request: pytest.FixtureRequest, rendered: dict[str, list[Document]]) -> list[Document]:
    """A copy of an overlay's documents, to be changed."""
    return copy.deepcopy(rendered[request.param])


def one(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def cluster(documents: list[Document]) -> Document:
    return one(documents, "RayCluster", "flam")["spec"]


# What is there


def test_all_parts_are_there(documents: list[Document]) -> None:
    found = {(each["kind"], each["metadata"]["name"]) for each in documents}
    wanted = {
        ("RayCluster", "flam"),
        ("RayJob", "flam-train"),
        ("RayJob", "flam-tune"),
        ("Deployment", "mlflow"),
        ("StatefulSet", "postgresql"),
        ("PodDisruptionBudget", "flam-ray-head"),
        ("NetworkPolicy", "default-deny"),
    }
    assert wanted <= found
    assert len(found) == len(documents), "two documents have one name"
    outside = [each for each in documents if each["kind"] != "Namespace" and each["metadata"]["namespace"] != "flam"]
    assert outside == []


def test_jobs_have_the_cluster_that_stands(documents: list[Document]) -> None:
    """But for the GPUs that they need to begin (test_capacity.py)."""
    for name in ("flam-train", "flam-tune"):
        spec = one(documents, "RayJob", name)["spec"]["rayClusterSpec"]
        stands, gpu = cluster(documents), spec["workerGroupSpecs"][1]
        for key in ("replicas", "minReplicas"):
            gpu[key] = stands["workerGroupSpecs"][1][key]
        assert spec == stands


def test_overlays_differ_in_size(rendered: dict[str, list[Document]]) -> None:
    most = {name: [each["maxReplicas"] for each in cluster(rendered[name])["workerGroupSpecs"]] for name in OVERLAYS}
    assert all(small < large for small, large in zip(most["small"], most["large"], strict=True))


def test_groups_scale_between_bounds(documents: list[Document]) -> None:
    spec = cluster(documents)
    assert spec["enableInTreeAutoscaling"] is True
    groups = {each["groupName"]: each for each in spec["workerGroupSpecs"]}
    assert set(groups) == {"decode", "gpu"}
    for group in groups.values():
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    gpus = {name: "nvidia.com/gpu" in _container(group)["resources"]["limits"] for name, group in groups.items()}
    assert gpus == {"decode": False, "gpu": True}
    # Models without a GPU are evaluated by a task, and the head takes none.
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert groups["decode"]["minReplicas"] >= 1


def _container(group: Document) -> Document:
    return group["template"]["spec"]["containers"][0]


def test_object_stores_fit_into_shared_memory(documents: list[Document]) -> None:
    spec = cluster(documents)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
        room = _bytes(volumes["shm"]["emptyDir"]["sizeLimit"])
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store < room < _bytes(_container(group)["resources"]["limits"]["memory"])


def _bytes(quantity: str) -> int:
    match = re.fullmatch(r"(\d+)(Mi|Gi)", quantity)
    assert match, quantity
    return int(match[1]) << {"Mi": 20, "Gi": 30}[match[2]]


def test_ray_is_the_pinned_one(documents: list[Document]) -> None:
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster(documents)['rayVersion']}" in pins


@pytest.mark.parametrize("job", ["train", "tune"])
def test_entrypoints_are_commands_that_the_jobs_take(documents: list[Document], job: str) -> None:
    import importlib

    import tyro

    spec = one(documents, "RayJob", f"flam-{job}")["spec"]
    python, program, *words = shlex.split(spec["entrypoint"])
    assert (python, program) == ("python", f"/app/jobs/{job}.py")
    module = importlib.import_module(f"jobs.{job}")
    default = module.from_recipe(words)  # takes the recipe's name off
    parsed = tyro.cli(module.Arguments, default=default, args=words)
    settings = parsed.settings if job == "train" else parsed.training
    assert settings.gpu
    assert settings.storage.startswith("s3://"), "what a pod keeps is lost with it: a retry could not resume"
    assert spec["suspend"] is True, "apply must start nothing"
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True


# Schemas


def test_ray_kinds_by_their_schemas(documents: list[Document], schemas: dict[str, Any]) -> None:
    found = {each["metadata"]["name"]: errors(each, schemas[each["kind"]]) for each in documents if _is_ray(each)}
    assert found == {"flam": [], "flam-train": [], "flam-tune": []}


def _is_ray(document: Document) -> bool:
    return document["apiVersion"] == "ray.io/v1"


def _misspelt(spec: Document) -> None:
    spec["enableInTreeAutoScaling"] = spec.pop("enableInTreeAutoscaling")


def _misspelt_in_pod(spec: Document) -> None:
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["securityContext"]["runAsNonroot"] = True


def _wrong_type(spec: Document) -> None:
    spec["workerGroupSpecs"][1]["maxReplicas"] = "8"


def _wrong_parameter(spec: Document) -> None:
    spec["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _missing(spec: Document) -> None:
    del spec["workerGroupSpecs"][0]["groupName"]


def _no_such_mode(spec: Document) -> None:
    spec["authOptions"]["mode"] = "password"


def _no_quantity(spec: Document) -> None:
    spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "8 GB"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_misspelt, "enableInTreeAutoScaling"),
        (_misspelt_in_pod, "runAsNonroot"),
        (_wrong_type, "'8' is not of type 'integer'"),
        (_wrong_parameter, "0 is not of type 'string'"),
        (_missing, "'groupName' is a required property"),
        (_no_such_mode, "'password' is not one of"),
        (_no_quantity, "8 GB"),
    ],
)
def test_schemas_find_mistakes(
    documents: list[Document], schemas: dict[str, Any], change: Callable[[Document], None], said: str
) -> None:
    change(cluster(documents))
    assert any(said in each for each in errors(one(documents, "RayCluster", "flam"), schemas["RayCluster"]))


def test_core_kinds_by_their_schemas(documents: list[Document]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    core = [each for each in documents if not _is_ray(each)]
    assert len(core) > 10
    for each in core:
        validate.validate(each, KUBERNETES, strict=True)
    budget = one(documents, "PodDisruptionBudget", "mlflow")
    budget["spec"]["maxUnavailible"] = budget["spec"].pop("maxUnavailable")
    with pytest.raises(validate.ValidationError, match="maxUnavailible"):
        validate.validate(budget, KUBERNETES, strict=True)


def test_selectors_find_their_pods(documents: list[Document]) -> None:
    """What a schema cannot tell: a selector that selects nothing."""
    labels = [pod.labels for pod in pods(documents)]
    for each in documents:
        spec = each.get("spec", {})
        wanted: list[Document] = []
        if each["kind"] == "Service":
            wanted = [spec["selector"]]
        elif each["kind"] in ("PodDisruptionBudget", "Deployment", "StatefulSet"):
            wanted = [spec["selector"]["matchLabels"]]
        for selector in wanted:
            assert any(selector.items() <= one.items() for one in labels), f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] in ("Deployment", "StatefulSet"):
            assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def test_services_lead_to_ports_that_are_open(documents: list[Document]) -> None:
    for service in (each for each in documents if each["kind"] == "Service"):
        selector = service["spec"]["selector"]
        for pod in (each for each in pods(documents) if selector.items() <= each.labels.items()):
            open_ports = {port["containerPort"] for one in pod.containers for port in one.get("ports", [])}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= open_ports, pod.owner


def test_volumes_accounts_and_config_maps_exist(documents: list[Document]) -> None:
    named = {(each["kind"], each["metadata"]["name"]) for each in documents}
    claims = {
        claim["metadata"]["name"]
        for each in documents
        if each["kind"] == "StatefulSet"
        for claim in each["spec"].get("volumeClaimTemplates", [])
    }
    for pod in pods(documents):
        assert ("ServiceAccount", pod.spec["serviceAccountName"]) in named, pod.owner
        volumes = {each["name"] for each in pod.spec.get("volumes", [])} | claims
        for container in pod.containers:
            assert {each["name"] for each in container.get("volumeMounts", [])} <= volumes, pod.owner
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in named, pod.owner


def test_secrets_are_those_that_the_readme_makes(documents: list[Document]) -> None:
    made: dict[str, set[str]] = {}
    text = (KUBERAY / "README.md").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if match := re.search(r"create secret generic (\S+) (.*)", line):
            made[match[1]] = set(re.findall(r"--from-(?:literal|file)=([\w.-]+)=", match[2]))
    used: dict[str, set[str]] = {"flam-ray": {"auth_token"}}
    assert cluster(documents)["authOptions"]["secretName"] == "flam-ray"
    for pod in pods(documents):
        for container in pod.containers:
            for variable in container.get("env", []):
                if (key := variable.get("valueFrom", {}).get("secretKeyRef")) is not None:
                    used.setdefault(key["name"], set()).add(key["key"])
        for volume in pod.spec.get("volumes", []):
            if "secret" in volume:
                items = {each["key"] for each in volume["secret"]["items"]}
                used.setdefault(volume["secret"]["secretName"], set()).update(items)
    assert used == made


# Rules for all pods


def test_no_rule_is_broken(documents: list[Document]) -> None:
    assert broken(documents) == []
    assert len(pods(documents)) >= 13, "three clusters of three kinds of pods, two submitters, MLflow, PostgreSQL"


def test_digests_of_flam_are_placeholders_that_somebody_must_set(documents: list[Document]) -> None:
    """None of a registry that the project does not own is made up: `kustomize edit set image` sets them."""
    images = {one["image"] for pod in pods(documents) for one in pod.containers if "image" in one}
    ours = {image for image in images if image.startswith("registry.example.com/")}
    assert {image.rpartition("@")[2] for image in ours} == {PLACEHOLDER}
    assert len(ours) == 2
    assert not any(image.endswith(PLACEHOLDER) for image in images - ours)
    readme = (KUBERAY / "README.md").read_text()
    for overlay in OVERLAYS:
        settings = yaml.safe_load((KUBERAY / "overlays" / overlay / "kustomization.yaml").read_text())
        assert len(settings["images"]) == len(images)
        for image in settings["images"]:
            if image["digest"] == PLACEHOLDER:
                assert f"{image['name']}=" in readme, (
                    f"the README's `kustomize edit set image` leaves {image['name']} out"
                )


def _first(documents: list[Document]) -> tuple[Document, Document]:
    """MLflow's pod spec and container."""
    spec = one(documents, "Deployment", "mlflow")["spec"]["template"]["spec"]
    return spec, spec["containers"][0]


def _root(documents: list[Document]) -> None:
    spec, container = _first(documents)
    del spec["securityContext"]["runAsNonRoot"]
    del container["securityContext"]["runAsNonRoot"]


def _uid_0(documents: list[Document]) -> None:
    _first(documents)[0]["securityContext"]["runAsUser"] = 0


def _root_worker(documents: list[Document]) -> None:
    group = one(documents, "RayJob", "flam-tune")["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]
    _container(group)["securityContext"]["runAsNonRoot"] = False


def _root_autoscaler(documents: list[Document]) -> None:
    del cluster(documents)["autoscalerOptions"]["securityContext"]


def _init_container(documents: list[Document]) -> None:
    _first(documents)[0]["initContainers"] = [{"name": "chown", "image": "busybox"}]


def _plain_secret(documents: list[Document]) -> None:
    _first(documents)[1]["env"].append({"name": "MLFLOW_AUTH_ADMIN_PASSWORD", "value": "hunter2"})


def _secret_in_address(documents: list[Document]) -> None:
    _first(documents)[1]["env"].append(
        {"name": "STORE", "value": "postgresql://mlflow:{}@postgresql/mlflow".format("plain")}
    )


def _secret_on_command_line(documents: list[Document]) -> None:
    _first(documents)[1]["args"].append("--backend-store-uri=postgresql://mlflow:$(POSTGRESQL_PASSWORD)@postgresql/m")


def _secret_in_manifest(documents: list[Document]) -> None:
    documents.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "flam-s3"}, "data": {}})


def _runtime_env(documents: list[Document]) -> None:
    one(documents, "RayJob", "flam-train")["spec"]["runtimeEnvYAML"] = "env_vars: {AWS_SECRET_ACCESS_KEY: x}"


def _tag(documents: list[Document]) -> None:
    _first(documents)[1]["image"] = "registry.example.com/flam-mlflow:latest"


def _zeros(documents: list[Document]) -> None:
    _first(documents)[1]["image"] = f"registry.example.com/flam-mlflow@sha256:{'0' * 64}"


def _no_limits(documents: list[Document]) -> None:
    del _container(cluster(documents)["workerGroupSpecs"][0])["resources"]["limits"]["memory"]


def _endless_volume(documents: list[Document]) -> None:
    _first(documents)[0]["volumes"][0]["emptyDir"] = {}


def _no_probe(documents: list[Document]) -> None:
    del _container(cluster(documents)["headGroupSpec"])["livenessProbe"]


def _writable(documents: list[Document]) -> None:
    _first(documents)[1]["securityContext"]["readOnlyRootFilesystem"] = False


def _no_tmp(documents: list[Document]) -> None:
    container = _container(cluster(documents)["headGroupSpec"])
    container["volumeMounts"] = [each for each in container["volumeMounts"] if each["mountPath"] != "/tmp"]


def _shm_on_disk(documents: list[Document]) -> None:
    volumes = cluster(documents)["workerGroupSpecs"][0]["template"]["spec"]["volumes"]
    for each in volumes:
        each["emptyDir"].pop("medium", None)


def _capability(documents: list[Document]) -> None:
    _first(documents)[1]["securityContext"]["capabilities"]["add"] = ["SYS_PTRACE"]


def _escalation(documents: list[Document]) -> None:
    del _first(documents)[1]["securityContext"]["allowPrivilegeEscalation"]


def _seccomp(documents: list[Document]) -> None:
    spec, container = _first(documents)
    spec["securityContext"].pop("seccompProfile")
    container["securityContext"]["seccompProfile"] = {"type": "Unconfined"}


def _host(documents: list[Document]) -> None:
    _first(documents)[0]["hostNetwork"] = True


def _host_path(documents: list[Document]) -> None:
    _first(documents)[0]["volumes"].append({"name": "disk", "hostPath": {"path": "/"}})


def _api_token(documents: list[Document]) -> None:
    _first(documents)[0]["automountServiceAccountToken"] = True


def _no_account(documents: list[Document]) -> None:
    del _first(documents)[0]["serviceAccountName"]


def _open_ray(documents: list[Document]) -> None:
    del one(documents, "RayJob", "flam-train")["spec"]["rayClusterSpec"]["authOptions"]


def _load_balancer(documents: list[Document]) -> None:
    one(documents, "Service", "mlflow")["spec"]["type"] = "LoadBalancer"


def _let_all_in(documents: list[Document]) -> None:
    del one(documents, "NetworkPolicy", "mlflow")["spec"]["ingress"][0]["from"]


def _metadata(documents: list[Document]) -> None:
    del one(documents, "NetworkPolicy", "object-storage")["spec"]["egress"][0]["to"][0]["ipBlock"]["except"]


@pytest.mark.parametrize(
    ("change", "rule", "who"),
    [
        (_root, "root", "Deployment mlflow"),
        (_uid_0, "root", "Deployment mlflow"),
        (_root_worker, "root", "RayJob flam-tune gpu"),
        (_root_autoscaler, "read-only", "RayCluster flam head: autoscaler"),
        (_init_container, "image", "Deployment mlflow: chown"),
        (_plain_secret, "secret", "Deployment mlflow"),
        (_secret_in_address, "secret", "Deployment mlflow"),
        (_secret_on_command_line, "secret", "Deployment mlflow"),
        (_secret_in_manifest, "secret", "Secret flam-s3"),
        (_runtime_env, "secret", "RayJob flam-train"),
        (_tag, "image", "Deployment mlflow"),
        (_zeros, "image", "Deployment mlflow"),
        (_no_limits, "resources", "RayCluster flam decode"),
        (_endless_volume, "resources", "Deployment mlflow"),
        (_no_probe, "probe", "RayCluster flam head"),
        (_writable, "read-only", "Deployment mlflow"),
        (_no_tmp, "written", "RayCluster flam head"),
        (_shm_on_disk, "written", "RayCluster flam decode"),
        (_capability, "privileges", "Deployment mlflow"),
        (_escalation, "privileges", "Deployment mlflow"),
        (_seccomp, "seccomp", "Deployment mlflow"),
        (_host, "host", "Deployment mlflow"),
        (_host_path, "host", "Deployment mlflow"),
        (_api_token, "account", "Deployment mlflow"),
        (_no_account, "account", "Deployment mlflow"),
        (_open_ray, "token", "RayJob flam-train"),
        (_load_balancer, "network", "Service mlflow"),
        (_let_all_in, "network", "NetworkPolicy mlflow"),
        (_metadata, "network", "NetworkPolicy object-storage"),
    ],
)
def test_rules_find_what_breaks_them(
    rendered: dict[str, list[Document]], change: Callable[[list[Document]], None], rule: str, who: str
) -> None:
    documents = copy.deepcopy(rendered["small"])
    change(documents)
    found = broken(documents)
    assert [each for each in found if each.startswith(f"{rule}: {who}")], found


# Who reaches whom

PARTS = {
    "head": {"flam-part": "ray", "flam-node": "head"},
    "worker": {"flam-part": "ray", "flam-node": "gpu"},
    "submitter": {"flam-part": "submitter"},
    "mlflow": {"flam-part": "mlflow"},
    "postgresql": {"flam-part": "postgresql"},
    "prometheus": {"flam-part": "prometheus"},
    "grafana": {"flam-part": "grafana"},
    "operator": {"app.kubernetes.io/name": "kuberay-operator", "elsewhere": "yes"},
    "stranger": {"elsewhere": "yes"},
    "outside": OUTSIDE,
}
PORTS = (80, 443, 3000, 5000, 5432, 6379, 6443, 8080, 8265, 9090, 10001)
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


# The plain renderer


def test_the_plain_renderer_gives_what_kustomize_gives(rendered: dict[str, list[Document]]) -> None:
    if kustomize_command() is None:
        pytest.skip("neither kubectl nor kustomize is installed: there is nothing to compare with")
    for name in OVERLAYS:
        assert _by_name(render_plainly(KUBERAY / "overlays" / name)) == _by_name(rendered[name])


def _by_name(documents: list[Document]) -> dict[tuple[str, str], Document]:
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


_MAP = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: one}\ndata: {key: value}\n"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("resources: [map.yaml]\nnamePrefix: x-\n", "namePrefix"),
        ("resources: [map.yaml]\nlabels: [{pairs: {a: b}, includeSelectors: true}]\n", "includeSelectors"),
        ("resources: [map.yaml]\nimages: [{name: a, newTag: b}]\n", "newTag"),
        ("configMapGenerator: [{name: a, files: [map.yaml]}]\n", "hashes"),
        ("resources: [map.yaml]\npatches: [{target: {kind: ConfigMap, name: two}, patch: '[]'}]\n", "names 0"),
        (
            "resources: [map.yaml]\npatches: [{target: {kind: ConfigMap, name: one}, "
            "patch: '[{op: remove, path: /data/key}]'}]\n",
            "remove",
        ),
        (
            "resources: [map.yaml]\npatches: [{target: {kind: ConfigMap, name: one}, "
            "patch: '[{op: test, path: /data/key, value: other}]'}]\n",
            "not other",
        ),
        (
            "resources: [map.yaml]\npatches: [{target: {kind: ConfigMap, name: one}, "
            "patch: '[{op: replace, path: /data/misspelt, value: other}]'}]\n",
            "misspelt",
        ),
    ],
)
def test_the_plain_renderer_refuses_what_it_does_not_know(tmp_path: Path, settings: str, said: str) -> None:
    (tmp_path / "map.yaml").write_text(_MAP)
    (tmp_path / "kustomization.yaml").write_text(settings)
    with pytest.raises(ValueError, match=said):
        render_plainly(tmp_path)


def test_pods_of_every_kind_are_looked_at() -> None:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c"}]}}
    documents = [
        {"kind": "Job", "metadata": {"name": "job"}, "spec": {"template": template}},
        {"kind": "CronJob", "metadata": {"name": "cron"}, "spec": {"jobTemplate": {"spec": {"template": template}}}},
        {"kind": "DaemonSet", "metadata": {"name": "set"}, "spec": {"template": template}},
        {"kind": "Pod", "metadata": {"name": "pod", "labels": {"a": "b"}}, "spec": template["spec"]},
    ]
    found: list[Pod] = pods(documents)
    assert [pod.owner for pod in found] == ["Job job", "CronJob cron", "DaemonSet set", "Pod pod"]
    assert all(pod.labels == {"a": "b"} for pod in found)

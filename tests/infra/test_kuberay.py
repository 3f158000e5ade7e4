"""What the manifests of both overlays have, by their own sense and by the schemas of KubeRay and Kubernetes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from services.registry.announce import PUSHGATEWAY
from tests.infra.manifests import KUBERAY, KUBERNETES, OVERLAYS, REPOSITORY, Document, cluster, container_of, one
from tests.infra.rules import pods, size
from tests.infra.schemas import errors

# What is there


def test_all_parts_are_there(documents: list[Document]) -> None:
    found = {(each["kind"], each["metadata"]["name"]) for each in documents}
    wanted = {
        ("RayCluster", "flam"),
        ("RayJob", "flam-train"),
        ("RayJob", "flam-tune"),
        ("Deployment", "mlflow"),
        ("StatefulSet", "postgresql"),
        ("Deployment", "prometheus"),
        ("PersistentVolumeClaim", "prometheus"),
        ("Deployment", "pushgateway"),
        ("Deployment", "grafana"),
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
    gpus = {name: "nvidia.com/gpu" in container_of(group)["resources"]["limits"] for name, group in groups.items()}
    assert gpus == {"decode": False, "gpu": True}
    # Models without a GPU are evaluated by a task, and the head takes none.
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert groups["decode"]["minReplicas"] >= 1


def test_object_stores_fit_into_shared_memory(documents: list[Document]) -> None:
    spec = cluster(documents)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
        room = size(volumes["shm"]["emptyDir"]["sizeLimit"])
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store < room < size(container_of(group)["resources"]["limits"]["memory"])


def test_nodes_have_the_time_to_end(documents: list[Document]) -> None:
    """Ray drains a node for 30 s by itself, then kills what commits, however long Kubernetes would wait."""
    from ray._private import ray_constants

    assert ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S > 0, "Ray does not know it any more"
    spec = cluster(documents)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        environment = {each["name"]: each.get("value") for each in container_of(group)["env"]}
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        for name in ("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S"):
            assert 60 <= float(environment[name]) <= grace - 20, name


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


def test_the_readmes_programs_take_their_flags() -> None:
    """What it has run in the head, and what it has the job train first."""
    import importlib

    import tyro

    text = (KUBERAY / "README.md").read_text()
    found = re.findall(r"python /app/jobs/(\w+)\.py ([^\n#\"]+)", text)
    assert {program for program, _ in found} == {"ingest", "doctor", "train"}
    for program, rest in found:
        module, words = importlib.import_module(f"jobs.{program}"), shlex.split(rest)
        start = {"default": module.from_recipe(words)} if program == "train" else {}
        tyro.cli(module.Arguments, args=words, use_underscores=True, **start)
    module = importlib.import_module("jobs.train")
    words = ["tiny", "--no-register"]
    assert "`--no-register`" in text
    assert not tyro.cli(module.Arguments, default=module.from_recipe(words), args=words).settings.register


def test_the_gate_and_prometheus_mean_one_pushgateway(documents: list[Document]) -> None:
    spec = cluster(documents)
    scrapes = yaml.safe_load(one(documents, "ConfigMap", "prometheus")["data"]["prometheus.yml"])["scrape_configs"]
    (pushed,) = [each for each in scrapes if each["job_name"] == "pushgateway"]
    assert pushed["honor_labels"] is True, "Prometheus would put its own `job` over the one that was pushed"
    (address,) = pushed["static_configs"][0]["targets"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        environment = {each["name"]: each.get("value") for each in container_of(group)["env"]}
        assert environment[PUSHGATEWAY] == f"http://{address}"
    host, _, port = address.partition(":")
    assert [each["port"] for each in one(documents, "Service", host)["spec"]["ports"]] == [int(port)]
    assert one(documents, "Deployment", host)["spec"]["replicas"] == 1


def test_prometheus_keeps_less_than_its_volume_holds(documents: list[Document]) -> None:
    deployment = one(documents, "Deployment", "prometheus")["spec"]
    assert deployment["strategy"] == {"type": "Recreate"}, "two pods would want one volume"
    args = deployment["template"]["spec"]["containers"][0]["args"]
    (kept,) = [int(word.partition("=")[2].removesuffix("GB")) for word in args if "retention.size" in word]
    room = one(documents, "PersistentVolumeClaim", "prometheus")["spec"]["resources"]["requests"]["storage"]
    assert kept * 10**9 < 0.95 * size(room)


def test_rays_dashboard_finds_prometheus_and_grafana(documents: list[Document]) -> None:
    from ray.dashboard.modules.metrics import metrics_head

    environment = {each["name"]: each.get("value") for each in container_of(cluster(documents)["headGroupSpec"])["env"]}
    addresses = {
        metrics_head.PROMETHEUS_HOST_ENV_VAR: "prometheus",
        metrics_head.GRAFANA_HOST_ENV_VAR: "grafana",
    }
    for variable, service in addresses.items():
        (port,) = one(documents, "Service", service)["spec"]["ports"]
        assert environment[variable] == f"http://{service}:{port['port']}"
    assert environment[metrics_head.GRAFANA_IFRAME_HOST_ENV_VAR] == "http://localhost:3000"
    settings = yaml.safe_load(one(documents, "ConfigMap", "grafana-provisioning")["data"]["datasource.yaml"])
    (source,) = settings["datasources"]
    assert source["name"] == metrics_head.DEFAULT_PROMETHEUS_NAME, "the panels in its frames would have no data"


def test_gpus_of_a_node_are_one_pods_in_the_large_overlay(rendered: dict[str, list[Document]]) -> None:
    """Else NCCL has no NVLink between ranks of one node."""
    (gpu,) = [each for each in cluster(rendered["large"])["workerGroupSpecs"] if each["groupName"] == "gpu"]
    assert container_of(gpu)["resources"]["limits"]["nvidia.com/gpu"] == "8"


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
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in named, pod.owner
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

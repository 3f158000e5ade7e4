"""Rules that all pods of both overlays keep, and that find what breaks them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import yaml

from tests.infra.manifests import KUBERAY, OVERLAYS, Document, cluster, container_of, one
from tests.infra.rules import PLACEHOLDER, broken, pods


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
    container_of(group)["securityContext"]["runAsNonRoot"] = False


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
    del container_of(cluster(documents)["workerGroupSpecs"][0])["resources"]["limits"]["memory"]


def _no_disk_limit(documents: list[Document]) -> None:
    del _first(documents)[1]["resources"]["limits"]["ephemeral-storage"]


def _evicted_too_soon(documents: list[Document]) -> None:
    _first(documents)[1]["resources"]["limits"]["ephemeral-storage"] = "2Gi"


def _operators_ray_folder(documents: list[Document]) -> None:
    container = container_of(cluster(documents)["headGroupSpec"])
    container["volumeMounts"] = [each for each in container["volumeMounts"] if each["mountPath"] != "/tmp/ray"]


def _endless_volume(documents: list[Document]) -> None:
    _first(documents)[0]["volumes"][0]["emptyDir"] = {}


def _no_probe(documents: list[Document]) -> None:
    del container_of(cluster(documents)["headGroupSpec"])["livenessProbe"]


def _writable(documents: list[Document]) -> None:
    _first(documents)[1]["securityContext"]["readOnlyRootFilesystem"] = False


def _no_tmp(documents: list[Document]) -> None:
    container = container_of(cluster(documents)["headGroupSpec"])
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


def _all_link_local(documents: list[Document]) -> None:
    one(documents, "NetworkPolicy", "dns")["spec"]["egress"][0]["to"][1]["ipBlock"]["cidr"] = "169.254.0.0/16"


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
        (_no_disk_limit, "resources", "Deployment mlflow: mlflow"),
        (_evicted_too_soon, "resources", "Deployment mlflow: volumes"),
        (_operators_ray_folder, "written", "RayCluster flam head"),
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
        (_all_link_local, "network", "NetworkPolicy dns"),
    ],
)
def test_rules_find_what_breaks_them(
    rendered: dict[str, list[Document]], change: Callable[[list[Document]], None], rule: str, who: str
) -> None:
    documents = copy.deepcopy(rendered["small"])
    change(documents)
    found = broken(documents)
    assert [each for each in found if each.startswith(f"{rule}: {who}")], found

"""The plain renderer gives what kustomize gives, and refuses what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infra.kustomize import kustomize_command, render_plainly
from tests.infra.manifests import KUBERAY, OVERLAYS, Document
from tests.infra.rules import Pod, pods


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

"""The manifests of both overlays, rendered."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest

from tests.infra.kustomize import render
from tests.infra.manifests import KUBERAY, OVERLAYS, REPOSITORY, Document
from tests.infra.schemas import ray_schemas


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

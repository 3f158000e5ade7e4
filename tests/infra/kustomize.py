"""Manifests as they come out of a kustomization: by kustomize where it is installed, else by a plain renderer.

The plain one knows what our kustomizations use and refuses everything else.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]

_KEYS = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "labels",
    "images",
    "patches",
    "configMapGenerator",
    "generatorOptions",
}
_WITHOUT_NAMESPACE = {"Namespace"}


def kustomize_command() -> list[str] | None:
    """How kustomize is called here, if it is."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for name, word in (("kubectl", "kustomize"), ("kustomize", "build")):  # extra `dev` brings kubectl
        if program := shutil.which(name, path=places):
            return [program, word]
    return None


def render(folder: Path) -> list[Document]:
    """All documents of a kustomization."""
    command = kustomize_command()
    if command is None:
        return render_plainly(folder)
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise ValueError(f"{folder}: {done.stderr}")
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def render_plainly(folder: Path) -> list[Document]:
    """The same without kustomize. Raises ValueError for what it does not know."""
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    _known(folder, settings, _KEYS)
    found: list[Document] = []
    for name in settings.get("resources", []):
        path = folder / name
        found += render_plainly(path) if path.is_dir() else _read(path)
    found += [_config_map(folder, one, settings) for one in settings.get("configMapGenerator", [])]
    for patch in settings.get("patches", []):
        _known(folder, patch, {"target", "patch"})
        _known(folder, patch["target"], {"kind", "name"})
        _patch(found, patch["target"], yaml.safe_load(patch["patch"]))
    for image in settings.get("images", []):
        _known(folder, image, {"name", "newName", "digest"})
        for one in found:
            _set_image(one, image)
    for label in settings.get("labels", []):
        _known(folder, label, {"pairs"})
        for one in found:
            one["metadata"].setdefault("labels", {}).update(label["pairs"])
    if "namespace" in settings:
        for one in found:
            if one["kind"] not in _WITHOUT_NAMESPACE:
                one["metadata"]["namespace"] = settings["namespace"]
    return found


def _known(folder: Path, found: dict[str, Any], known: set[str]) -> None:
    if unknown := set(found) - known:
        raise ValueError(f"{folder}: the plain renderer does not know {', '.join(sorted(unknown))}")


def _read(path: Path) -> list[Document]:
    found: list[Document] = []
    for one in yaml.safe_load_all(path.read_text()):
        found += one["items"] if one["kind"] == "List" else [one]
    # YAML anchors are one object in several places.
    return [_without_sharing(one) for one in found]


def _without_sharing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_sharing(one) for key, one in value.items()}
    return [_without_sharing(one) for one in value] if isinstance(value, list) else value


def _config_map(folder: Path, settings: dict[str, Any], whole: dict[str, Any]) -> Document:
    _known(folder, settings, {"name", "files"})
    if whole.get("generatorOptions") != {"disableNameSuffixHash": True}:
        raise ValueError(f"{folder}: the plain renderer makes config maps without hashes in their names alone")
    data = {}
    for entry in settings["files"]:
        key, _, path = entry.rpartition("=")
        data[key or Path(path).name] = (folder / path).read_text()
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": settings["name"]}, "data": data}


def _set_image(value: Any, image: dict[str, str]) -> None:
    if isinstance(value, list):
        for one in value:
            _set_image(one, image)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key in ("containers", "initContainers"):
                for container in part:
                    if container.get("image") == image["name"]:
                        container["image"] = f"{image['newName']}@{image['digest']}"
            _set_image(part, image)


def _patch(found: list[Document], target: dict[str, str], operations: list[dict[str, Any]]) -> None:
    hit = [one for one in found if (one["kind"], one["metadata"]["name"]) == (target["kind"], target["name"])]
    if len(hit) != 1:
        raise ValueError(f"{target} names {len(hit)} documents")
    for operation in operations:
        *way, last = operation["path"].strip("/").split("/")
        place: Any = hit[0]
        for step in way:
            place = place[_step(place, step)]
        key = _step(place, last)
        if operation["op"] == "test":
            if place[key] != operation["value"]:
                raise ValueError(f"{target} {operation['path']} is {place[key]}, not {operation['value']}")
        elif operation["op"] == "replace":
            place[key] = copy.deepcopy(operation["value"])
        else:
            raise ValueError(f"the plain renderer does not know the operation {operation['op']}")


def _step(place: Any, step: str) -> str | int:
    key: str | int = int(step) if isinstance(place, list) else step.replace("~1", "/").replace("~0", "~")
    if isinstance(place, dict) and key not in place:
        raise ValueError(f"there is no {step} to patch")
    return key

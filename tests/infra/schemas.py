"""KubeRay's schemas, made strict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import yaml


def strict(schema: Any) -> Any:
    """A schema that refuses fields it does not name, where it names any, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(one) for key, one in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type", "object") == "object"
    if named and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return found


def ray_schemas(folder: Path) -> dict[str, Any]:
    """Strict schemas of `ray.io/v1` by kind."""
    found = {}
    for path in sorted(folder.glob("ray.io_*.yaml")):
        definition = yaml.safe_load(path.read_text())["spec"]
        for version in definition["versions"]:
            if version["name"] == "v1":
                found[definition["names"]["kind"]] = _with_metadata(strict(version["schema"]["openAPIV3Schema"]))
    return found


def _with_metadata(schema: dict[str, Any]) -> dict[str, Any]:
    """CRDs leave `metadata` to Kubernetes: these are the fields of it that ours use."""
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    fields = {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": texts, "annotations": texts}
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": fields,
        "required": ["name"],
        "additionalProperties": False,
    }
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return schema


def errors(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """What the document has that the schema does not allow."""
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{'/'.join(map(str, one.absolute_path))}: {one.message}" for one in validator.iter_errors(document)]

"""Configs as JSON and back, checked field by field."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Literal, TypeVar

from flam_core.errors import SettingsError

ConfigT = TypeVar("ConfigT")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types. Equal configs give equal dicts: a 2 where a float is meant becomes 2.0."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return json.loads(json.dumps(dataclasses.asdict(from_dict(type(config), plain))))


def from_dict(kind: type[ConfigT], values: Any, where: str = "config") -> ConfigT:
    """Rebuild a config of type `kind` from `to_dict`'s output.

    Raises SettingsError for a field that is unknown, missing or of the wrong type.
    """
    if not isinstance(values, dict):
        raise SettingsError(f"{where} is {type(values).__name__}, not an object", fix="Is it written by flam?")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise SettingsError(
            f"{where} has unknown fields {', '.join(unknown)}", fix="It was written by another version of flam."
        )
    known = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return kind(**known)
    except TypeError as error:
        raise SettingsError(f"{where} is incomplete: {error}", fix="It was written by another version.") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) == len(value):
            return tuple(_convert(k, v, where) for k, v in zip(inner, value, strict=True))
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            if option is type(None) and value is None:
                return None
            if option is not type(None) and value is not None:
                return _convert(option, value, where)
    elif origin is Literal:
        if value in arguments:
            return value
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise SettingsError(f"{where} = {value!r} is not a valid {kind}", fix="Was the file edited by hand?")


def given_values(value: Any) -> dict[str, Any]:
    """The values of a config that are not defaults, as plain JSON: the same if fields are added later."""
    found: dict[str, Any] = {}
    plain = to_dict(value)
    for f in dataclasses.fields(value):
        current = getattr(value, f.name)
        if dataclasses.is_dataclass(current):
            found[f.name] = given_values(current)
        elif f.default is dataclasses.MISSING or current != f.default:
            found[f.name] = plain[f.name]
    return found


def differing_fields(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two configs of one type differ, with both values."""
    found = []
    for f in dataclasses.fields(a):
        left, right, name = getattr(a, f.name), getattr(b, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(left) and type(left) is type(right):
            found += differing_fields(left, right, f"{name}.")
        elif left != right:
            found.append(f"{name} ({left} there, {right} here)")
    return found

"""Manifests, checkpoints and models are data: nothing that is read can run code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("flam_core", "services", "jobs") for path in (REPOSITORY / folder).rglob("*.py"))

RUN_CODE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
"""Modules that make objects, and so calls, of what they read."""
SAFE_BY = {
    "torch.load": ("weights_only", True),
    "torch.serialization.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
NEVER = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"}


def dangers(source: str) -> Iterator[str]:
    """What in Python source would run code that came with data."""
    tree = ast.parse(source)
    meant = _meant(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {one.name}" for one in node.names if one.name.partition(".")[0] in RUN_CODE)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in RUN_CODE:
            yield f"from {node.module}"
        elif isinstance(node, ast.Call):
            yield from _of_call(node, meant)


def _meant(tree: ast.AST) -> dict[str, str]:
    """What each name of the source stands for: `load` for torch.load after `from torch import load`, and so on.

    A name that is given on by `other = load` too.
    """
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({one.asname: one.name for one in node.names if one.asname})
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.update({one.asname or one.name: f"{node.module}.{one.name}" for one in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
            whole = _whole(ast.unparse(node.value), found)
            if whole in SAFE_BY or whole in NEVER:
                found.update({target.id: whole for target in node.targets if isinstance(target, ast.Name)})
    return found


def _whole(name: str, meant: dict[str, str]) -> str:
    first, dot, rest = name.partition(".")
    return f"{meant.get(first, first)}{dot}{rest}".removeprefix("builtins.")


def _of_call(node: ast.Call, meant: dict[str, str]) -> Iterator[str]:
    called = _whole(ast.unparse(node.func), meant)
    given = {one.arg: one.value.value for one in node.keywords if isinstance(one.value, ast.Constant)}
    if called in NEVER:
        yield called
    if called in SAFE_BY and given.get(SAFE_BY[called][0]) is not SAFE_BY[called][1]:
        yield f"{called} without {SAFE_BY[called][0]}={SAFE_BY[called][1]}"
    if given.get("shell") is True:
        yield f"{called} with shell=True"
    if called.endswith(".extractall") or called.endswith(".unpack_archive"):
        yield f"{called}: writes wherever an archive says"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_that_is_read_runs_code(path: Path) -> None:
    assert list(dangers(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path, weights_only=False)",
        "import torch as t\nt.load(path)",
        "import torch\nread = torch.load\nread(path)",
        "from torch import serialization\nserialization.load(path)",
        "import numpy as n\nn.load(path)",
        "from numpy import load\nload(path, allow_pickle=True)",
        "from yaml import load\nload(text)",
        "import yaml as y\ny.full_load(text)",
        "from os import system\nsystem(text)",
        "import builtins\nbuiltins.eval(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "tarfile.open(path).extractall(folder)",
    ],
)
def test_what_would_is_found(source: str) -> None:
    assert list(dangers(source))


def test_what_is_safe_is_not() -> None:
    safe = (
        "torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\nmodel.eval()\njson.loads(text)\n"
        "from torch import load\nload(f, weights_only=True)\nfrom flam_core import load as read\nread(address)"
    )
    assert list(dangers(safe)) == []

"""Models on disk: safetensors for the weights, JSON for the config, a card for people. No pickle anywhere."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, overload

import safetensors
import safetensors.torch
from torch import nn

from flam_core.config import ModelConfig, TokenizerConfig
from flam_core.config_json import from_dict, to_dict
from flam_core.errors import DataError, EnvironmentFault, SettingsError
from flam_core.model import Flam
from flam_core.model.tokenizer import Tokenizer
from flam_core.ranks import whole

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
_FORMAT = 3


def weights_to_bytes(model: nn.Module) -> bytes:
    """The weights and buffers of a model in safetensors format. If ranks share them out, all must call it."""
    return safetensors.torch.save({k: whole(v.detach()).cpu().contiguous() for k, v in _weights(model).items()})


def weights_from_bytes(model: nn.Module, content: bytes) -> None:
    """Load what `weights_to_bytes` gave. Raises DataError if it does not fit the model or is damaged."""
    try:
        loaded = safetensors.torch.load(content)
        own = _weights(model)
        shapes, own_shapes = ({k: v.shape for k, v in weights.items()} for weights in (loaded, own))
        if odd := sorted({name for name, _ in shapes.items() ^ own_shapes.items()}):
            raise DataError(
                f"weights do not fit the model: {', '.join(odd[:3])} differ", fix="Another version of flam?"
            )
        model.load_state_dict(loaded, strict=False)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise DataError(f"weights cannot be read: {str(error).splitlines()[0]}", fix="Is the file whole?") from error


def _weights(model: nn.Module) -> dict[str, Any]:
    """The state dict without second names of shared tensors, which safetensors refuses."""
    seen: set[int] = set()
    weights = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            weights[name] = value
    return weights


def save_model(model: Flam, folder: Path, card: str) -> None:
    """Write a model to a folder: `model.safetensors`, `config.json` and the model card `README.md`."""
    _save(model, folder, card, {"tokenizer": to_dict(model.tokenizer.config), "model": to_dict(model.dynamics.config)})


def save_tokenizer(tokenizer: Tokenizer, folder: Path, card: str) -> None:
    """Write a tokenizer alone, as `save_model` does a model: for `load_tokenizer`."""
    _save(tokenizer, folder, card, {"tokenizer": to_dict(tokenizer.config), "model": None})


def _save(module: nn.Module, folder: Path, card: str, configs: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights_to_bytes(module)
    config = {"format": _FORMAT, "weights_sha256": hashlib.sha256(weights).hexdigest(), **configs}
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / CARD).write_text(card)


def load(address: str | Path) -> Flam:
    """A model, ready to use (evaluation mode, CPU).

    `address` is a folder that `save_model` wrote, a run's output folder (its `model/`), or an address with a scheme
    that an installed package resolves, such as `models:/flam-grid/1` (MLflow). Raises DataError if there is no model
    or it is not what was saved, SettingsError for an unknown scheme.
    """
    return _load(address)


def load_tokenizer(address: str | Path) -> Tokenizer:
    """The tokenizer of a model, or one that was saved alone; addresses and errors as for `load`."""
    found = _load(address, tokenizer_alone=True)
    return found if isinstance(found, Tokenizer) else found.tokenizer


@overload
def _load(address: str | Path) -> Flam: ...
@overload
def _load(address: str | Path, *, tokenizer_alone: bool) -> Flam | Tokenizer: ...
def _load(address: str | Path, *, tokenizer_alone: bool = False) -> Flam | Tokenizer:
    """The model; with `tokenizer_alone` a tokenizer, where there is nothing else."""
    folder = model_folder(address)
    config, weights = _read(folder, address)
    try:
        tokenizer = from_dict(TokenizerConfig, config.get("tokenizer"), "tokenizer")
        if config.get("model") is None and not tokenizer_alone:
            raise DataError(
                f"{address} is a tokenizer alone", fix=f"Train FLAM on it: jobs/train.py --tokenizer_from {address}."
            )
        if config.get("model") is None:
            model = Tokenizer(tokenizer)
        else:
            model = Flam(tokenizer, from_dict(ModelConfig, config["model"], "model"))
    except SettingsError as error:
        raise DataError(f"{folder / CONFIG}: {error.what}", fix=error.fix) from error
    weights_from_bytes(model, weights)
    return model.eval()


def _read(folder: Path, address: str | Path) -> tuple[dict[str, Any], bytes]:
    """The config and the weights that belong together. Raises DataError for what is not that."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = (folder / WEIGHTS).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"no model at {address}: {Path(error.filename).name} is missing", fix="Give the folder of a model or run."
        ) from error
    except ValueError as error:
        raise DataError(f"{folder / CONFIG} is not JSON: {error}", fix="Is the file whole?") from error
    written = config.get("format") if isinstance(config, dict) else None
    if written != _FORMAT:
        newer = isinstance(written, int) and written > _FORMAT
        fix = "A newer flam wrote it: update flam." if newer else "It was written by another flam."
        raise DataError(f"{folder / CONFIG} is of format {written}, and this flam reads {_FORMAT}", fix=fix)
    digest = hashlib.sha256(weights).hexdigest()
    if digest != config.get("weights_sha256"):
        raise DataError(
            f"{folder / WEIGHTS} is not what was saved: its sha256 is {digest[:12]}..., {CONFIG} says "
            f"{str(config.get('weights_sha256'))[:12]}...",
            fix="Get the model anew: the file is damaged, or belongs to another.",
        )
    return config, weights


def model_folder(address: str | Path) -> Path:
    """The local folder that `load` reads for an address: what lies beside the weights may be read there too.

    A registered model is downloaded. Raises what `load` raises for an address that leads nowhere.
    """
    folder = _folder(str(address))
    if not (folder / WEIGHTS).is_file() and (folder / "model" / WEIGHTS).is_file():
        return folder / "model"  # a run's folder, which has a config.json of its own
    return folder


def saved_sha256(folder: Path) -> str:
    """sha256, in hex, of the weights in a model's folder, which `load` compares with them."""
    return str(_read(folder, folder)[0]["weights_sha256"])


def _folder(address: str) -> Path:
    scheme, separator, _ = address.partition(":/")
    if not separator or scheme == "file":
        return Path(address.removeprefix("file://").removeprefix("file:"))
    resolvers = {point.name: point for point in entry_points(group="flam.addresses")}
    if scheme in resolvers:
        return Path(resolvers[scheme].load()(address))
    known = ", ".join(f"{name}:/" for name in sorted(resolvers))
    if not known:
        raise EnvironmentFault(f"{address}: nothing installed resolves {scheme}:/", fix="pip install flam itself.")
    raise SettingsError(f"{address}: unknown scheme {scheme}:/", fix=f"Known: a folder, {known}.")

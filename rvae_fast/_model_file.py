"""A network as the document and tensors of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rvae_fast._covered import METHODS
from rvae_fast._version import __version__
from rvae_fast.models import MODELS, Autoencoder
from rvae_fast.nn import Transition


class FileFormatError(ValueError):
    """A file that :func:`rvae_fast.load` cannot read: damaged, foreign, or written by a newer version."""


def article(kind: object) -> str:
    """A kind of object with its article, for a sentence."""
    return f"{'an' if str(kind)[:1] in 'aeiou' else 'a'} {kind}"


def unknown(path: Path, kind: object, name: object) -> str:
    """What to say of a file of something that this version has not got."""
    return f"{path} holds {article(kind)} of class {name!r}, which rvae-fast {__version__} does not know"


def describe_model(model: Autoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Document and tensors of a network; a ValueError for one that its configuration does not describe any more."""
    name = type(model).__name__
    if MODELS.get(name) is not type(model):
        raise TypeError(
            f"save takes an AE, RAE, VAE or RVAE itself, got the subclass {name}: load could not make it again"
        )
    config = model.config()
    with torch.device("meta"):
        made = type(model)(**config)
    if notes := _unlike(model, made):
        raise ValueError(
            f"save takes a network that load can make again from its constructor's arguments; of this {name} {notes}"
        )
    tensors = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    frozen = [key for key, parameter in _parameters(model).items() if not parameter.requires_grad]
    return {"kind": "model", "class": name, "config": config, "frozen": frozen}, tensors


def restore_model(path: Path, name: str, document: dict[str, Any], tensors: dict[str, Tensor]) -> Autoencoder:
    """The network of class ``name`` that a file's document describes, in eval mode."""
    state = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
    try:
        # On the meta device: no memory is taken, and no random number drawn, before the shapes are known to agree.
        with torch.device("meta"):
            model = MODELS[name](**document["config"])
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{path} holds a configuration that {name} does not take: {error}") from error
    expected, found = _shapes(model.state_dict()), _shapes(state)
    if expected != found:
        notes = _listed(_difference(expected, found))
        raise FileFormatError(f"{path} does not fit a {name} of its configuration: {notes}")
    model.load_state_dict(state, assign=True)
    frozen = document.get("frozen", [])  # files of earlier versions have none
    for key, parameter in _parameters(model).items():
        parameter.requires_grad_(key not in frozen)
    return model.eval()


def _parameters(model: Autoencoder) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _shapes(state: dict[str, Tensor]) -> dict[str, Any]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _unlike(model: Autoencoder, made: Autoencoder) -> str:
    """What a network has been given since that its constructor's arguments do not say; empty if nothing."""
    own = dict(model.named_modules(remove_duplicate=False))
    expected = dict(made.named_modules(remove_duplicate=False))
    notes = [f"{method} was replaced" for method in METHODS if method in vars(model)]
    for name, module in expected.items():
        found = own.get(name)
        if found is None:
            notes.append(f"{name} is missing")
        # Of the same weights a Linear makes the same numbers, to the bit.
        elif type(found) is not type(module) and (type(found), type(module)) != (nn.Linear, Transition):
            notes.append(f"{name} is a {type(found).__name__}, not a {type(module).__name__}")
        else:
            if name and "forward" in vars(found):
                notes.append(f"{name}.forward was replaced")
            notes += [
                f"{name + '.' if name else ''}{option} is {vars(found).get(option)!r}, not {value!r}"
                for option, value in _options(module).items()
                if vars(found).get(option) != value
            ]
    notes += [f"{name} is a {type(module).__name__} too many" for name, module in own.items() if name not in expected]
    # Modules that differ have other tensors: to name these as well would say it twice.
    return _listed(notes or _difference(_shapes(made.state_dict()), _shapes(model.state_dict())))


def _options(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are neither its children nor tensors: eps, momentum, activation, widths, ..."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, (bool, int, float, str, type(None)))
    }


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    notes = [f"{key} is missing" for key in expected if key not in found]
    notes += [f"{key} is not known" for key in found if key not in expected]
    notes += [f"{key} has shape {list(found[key])}, not {list(shape)}" for key, shape in expected.items()
              if found.get(key, shape) != shape]  # fmt: skip
    return notes


def _listed(notes: list[str]) -> str:
    return "; ".join(notes[:3]) + (f"; and {len(notes) - 3} more" if len(notes) > 3 else "")

"""A network as the document and tensors of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvae_fast._version import __version__
from rvae_fast.models import MODELS, Autoencoder


class FileFormatError(ValueError):
    """A file that :func:`rvae_fast.load` cannot read: damaged, foreign, or written by a newer version."""


def article(kind: object) -> str:
    """A kind of object with its article, for a sentence."""
    return f"{'an' if str(kind)[:1] in 'aeiou' else 'a'} {kind}"


def unknown(path: Path, kind: object, name: object) -> str:
    """What to say of a file of something that this version has not got."""
    return f"{path} holds {article(kind)} of class {name!r}, which rvae-fast {__version__} does not know"


def describe_model(model: Autoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Document and tensors of a network."""
    name = type(model).__name__
    if MODELS.get(name) is not type(model):
        raise TypeError(
            f"save takes an AE, RAE, VAE or RVAE itself, got the subclass {name}: load could not make it again"
        )
    tensors = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    return {"kind": "model", "class": name, "config": model.config()}, tensors


def restore_model(path: Path, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Autoencoder:
    """The network that a file describes, in eval mode."""
    state = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
    try:
        # On the meta device: no memory is taken, and no random number drawn, before the shapes are known to agree.
        with torch.device("meta"):
            model = MODELS[name](**config)
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{path} holds a configuration that {name} does not take: {error}") from error
    expected = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    found = {key: tuple(t.shape) for key, t in state.items()}
    if expected != found:
        raise FileFormatError(f"{path} does not fit a {name} of its configuration: {_difference(expected, found)}")
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    notes = [f"{key} is missing" for key in expected if key not in found]
    notes += [f"{key} is not known" for key in found if key not in expected]
    notes += [f"{key} has shape {list(found[key])}, not {list(shape)}" for key, shape in expected.items()
              if found.get(key, shape) != shape]  # fmt: skip
    return "; ".join(notes[:3]) + (f"; and {len(notes) - 3} more" if len(notes) > 3 else "")

"""Learning rate and warm-up where none is given: by depth and width of the network and the length of an epoch.

A step of Adam moves every weight by about the learning rate, whatever the gradient, and so an output of a linear layer
by up to the rate times the number of its inputs. In a sequence of residual units that start as the identity all of that
adds up in one stream: what a step can change grows with the sum of the layers' inputs, and the rate has to fall with
it. Measured from 10 to 200 layers and from 64 to 784 features in ``docs/notes/defaults.md``.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from rvae_fast._training_config import LEARNING_RATE, TrainingConfig
from rvae_fast.nn import ResidualBlock

#: Inputs of all linear layers together up to which the rate holds; the article's network (784 features, code 20, ten
#: layers a side) has 10,332.
INPUTS = 3_500
#: Steps that a warm-up takes at least, where an epoch has fewer, but no more than this share of the run.
WARMUP_STEPS, WARMUP_SHARE = 20, 0.2


def default_learning_rate(model: nn.Module) -> float:
    """Learning rate at which Adam trains a network: what ``learning_rate="auto"`` stands for.

    2e-3, and for networks with pre-activation residual units less where they are deep and wide: in inverse proportion
    to the inputs of all linear layers together (7 over their sum, where that is less). Plain networks and
    ``order="post"`` normalise what they pass on layer by layer, and want no lower rate for depth.

    Parameters
    ----------
    model : nn.Module
        Any network, made of :class:`rvae_fast.ResidualBlock` or not; its ``nn.Linear`` layers are counted.

    Returns
    -------
    float

    Examples
    --------
    >>> from rvae_fast import RVAE
    >>> [round(default_learning_rate(RVAE(784, n_layers=n)), 5) for n in (10, 20, 80, 200)]
    [0.00068, 0.00037, 9e-05, 4e-05]
    """
    modules = list(model.modules())
    if not any(isinstance(module, ResidualBlock) and module.order == "pre" for module in modules):
        return LEARNING_RATE
    inputs = sum(module.in_features for module in modules if isinstance(module, nn.Linear))
    return LEARNING_RATE * min(1.0, INPUTS / inputs)


def default_warmup_epochs(epochs: int, steps_per_epoch: int) -> float:
    """One epoch, or the twenty steps that Adam's averages need to mean something, if they are more."""
    return max(1.0, min(WARMUP_STEPS / steps_per_epoch, WARMUP_SHARE * epochs))


def resolved(config: TrainingConfig, model: nn.Module, steps_per_epoch: int) -> TrainingConfig:
    """The configuration with numbers in place of ``"auto"`` for learning rate and warm-up.

    Raises
    ------
    ValueError
        If ``final_learning_rate`` is above the rate that ``"auto"`` stands for.
    """
    numbers: dict[str, float] = {}
    if config.learning_rate == "auto":
        numbers["learning_rate"] = default_learning_rate(model)
    if config.warmup_epochs == "auto":
        numbers["warmup_epochs"] = default_warmup_epochs(config.epochs, steps_per_epoch)
    return dataclasses.replace(config, **numbers)  # type: ignore[arg-type]

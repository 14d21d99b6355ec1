"""The options of ``fit``: their choices, and those that set a parameter of the detector, with what they become.

Every one of the latter is None unless given, so that the detector's (or the preset's) own default holds.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, NamedTuple

import typer

from rvae_fast.cli.common import usage_error

__all__ = ["MODEL", "PARAMETERS", "TRAINING", "Kind", "Missing", "Parameter", "Preset", "Scaling", "as_parameters"]

MODEL, TRAINING = "Model", "Training"

#: How an option is shown that is a list of whole numbers.
NUMBERS = "N,N,..."


class Kind(str, Enum):
    """The four networks."""

    rvae = "rvae"
    vae = "vae"
    rae = "rae"
    ae = "ae"


class Preset(str, Enum):
    """Kinds of data."""

    table = "table"
    image = "image"
    image_hyperplane = "image-hyperplane"
    image_views = "image-views"
    image_two_rates = "image-two-rates"


class Scaling(str, Enum):
    """Scalers; ``none`` leaves the columns alone."""

    standard = "standard"
    minmax = "minmax"
    none = "none"


class Missing(str, Enum):
    """What a missing value is."""

    error = "error"
    mean = "mean"
    median = "median"


class Parameter(NamedTuple):
    """An option: the detector's parameter, the option's name, its type, its help and its panel."""

    name: str
    flag: str
    kind: type
    help: str
    panel: str
    metavar: str | None = None
    short: str | None = None

    @property
    def variable(self) -> str:
        """Name of the function's argument."""
        return self.flag.removeprefix("--").replace("-", "_")

    def annotation(self) -> Any:
        """Return the type annotation that typer reads."""
        flags = [self.flag] + ([self.short] if self.short else [])
        option = typer.Option(*flags, help=self.help, metavar=self.metavar, rich_help_panel=self.panel)
        return Annotated[self.kind | None, option]


PARAMETERS = (
    Parameter(
        "latent_features", "--latent", int, "Width of the bottleneck [default: by the number of columns].", MODEL
    ),
    Parameter("n_layers", "--layers", int, "Linear layers of the encoder; the decoder mirrors them.", MODEL),
    Parameter("widths", "--widths", str, "Instead: widths of the encoder's stages.", MODEL, NUMBERS),
    Parameter("blocks", "--blocks", str, "Residual units of each stage.", MODEL, NUMBERS),
    Parameter("order", "--order", str, "Kind of residual unit: pre or post.", MODEL),
    Parameter("activation", "--activation", str, "leaky_relu, relu, elu, silu, gelu, tanh, identity.", MODEL),
    Parameter("likelihood", "--likelihood", str, "Error: squared, absolute or bernoulli.", MODEL),
    Parameter("dropout", "--dropout", float, "In the residual units.", MODEL),
    Parameter(
        "anomaly_score",
        "--score-by",
        str,
        "reconstruction, elbo (error plus KL), sap, nap, local or hyperplane.",
        MODEL,
    ),
    Parameter(
        "views",
        "--views",
        str,
        "For flattened images: the lowest score over small deformations counts. image if square, or the shape: 28x28, "
        "or with the channels first, one after the other, 3x32x32 (--image-shape has them last).",
        MODEL,
        "image|HxW|CxHxW",
    ),
    Parameter("contamination", "--contamination", float, "Share of training rows to flag [default: 0.1].", MODEL),
    Parameter(
        "epochs", "--epochs", int, "Passes over the rows [default: about 1000 steps' worth].", TRAINING, None, "-e"
    ),
    Parameter("batch_size", "--batch-size", int, "[default: 256]", TRAINING, None, "-b"),
    Parameter("learning_rate", "--learning-rate", float, "[default: 0.002, less for deep and wide nets]", TRAINING),
    Parameter("optimizer", "--optimizer", str, "adamw, adam or radam.", TRAINING),
    Parameter("weight_decay", "--weight-decay", float, "[default: 0]", TRAINING),
    Parameter("schedule", "--schedule", str, "Learning rate: cosine, linear, constant.", TRAINING),
    Parameter(
        "warmup_epochs", "--warmup-epochs", float, "Of the learning rate [default: 1, or 20 steps' worth].", TRAINING
    ),
    Parameter("max_grad_norm", "--max-grad-norm", float, "Clip the gradient's norm at this [default: 10].", TRAINING),
    Parameter("accumulate", "--accumulate", int, "Batches gathered into a step.", TRAINING),
    Parameter(
        "kld_weight",
        "--kld-weight",
        float,
        "Of the KL divergence [default: 1].",
        TRAINING,
    ),
    Parameter("kld_warmup_epochs", "--kld-warmup-epochs", float, "Epochs over which it rises.", TRAINING),
    Parameter(
        "validation_fraction", "--validation", float, "Share of rows held out; the best epoch is kept.", TRAINING
    ),
    Parameter("patience", "--patience", int, "Stop so many epochs after the best one.", TRAINING),
    Parameter("device", "--device", str, "auto, cpu, cuda, ...", TRAINING),
    Parameter("precision", "--precision", str, "auto, fp32 or bf16.", TRAINING),
)


def _numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        usage_error(f"{text!r} is not a list of whole numbers such as 512,256,64", flag)


def as_parameters(values: dict[str, Any], known: Any, model: str) -> dict[str, Any]:
    """Turn the options that were given into the detector's parameters.

    Parameters
    ----------
    values : dict
        Value of each option by ``Parameter.variable``, None where it was not given.
    known : container of str
        Parameters that the chosen detector has: an option that means nothing to it is an error, not ignored.
    model : str
        Its name, for the message.
    """
    given = {}
    for parameter in PARAMETERS:
        value = values[parameter.variable]
        if value is None:
            continue
        if parameter.name not in known:
            usage_error(f"--model {model} has no such parameter", parameter.flag)
        given[parameter.name] = _numbers(value, parameter.flag) if parameter.metavar == NUMBERS else value
    return given

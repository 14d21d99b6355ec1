"""Everything a training run can be told, in one frozen, validated dataclass."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

_INF = math.inf

#: What a learning rate of ``"auto"`` stands for in networks that are not deep (see ``rvae_fast._rates``).
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class TrainingConfig:
    """Options of :func:`rvae_fast.training.train`.

    Parameters
    ----------
    epochs : int, default 100
        Passes over the training rows.
    batch_size : int, default 256
        Rows of a forward pass (at least 2: BatchNorm cannot train on one).
    optimizer : {"adamw", "adam", "radam"}, default "adamw"
        PyTorch's own; weight decay is decoupled in ``adamw`` (Loshchilov and Hutter 2019) and an L2 term in ``adam``
        and ``radam`` (Liu et al. 2020), which is slower: PyTorch has no fused kernel for it.
    learning_rate : float or "auto", default "auto"
        The highest of the schedule. ``"auto"`` is 2e-3, and less for pre-activation residual networks that are deep and
        wide: 7 over the inputs of all linear layers together. That is 6.8e-4 for the article's network (784 features,
        ten layers a side), 8.7e-5 for 80 layers a side. At a shallow network's rate the loss of a deep one jumps, and
        ends higher.
    weight_decay : float, default 0.0
    betas : (float, float), default (0.9, 0.999)
    eps : float, default 1e-8
    warmup_epochs : float or "auto", default "auto"
        Epochs, or a fraction of one, over which the learning rate rises linearly, step by step. ``"auto"`` is one, or
        what makes 20 steps (a fifth of the run at most) where an epoch has fewer.
    schedule : {"cosine", "linear", "constant"}, default "cosine"
        What it does from there to the last step.
    final_learning_rate : float, default 0.0
        Where ``cosine`` and ``linear`` end.
    max_grad_norm : float or None, default 10.0
        The gradient is scaled down to this global L2 norm when it is larger; None turns clipping off. The norm before
        clipping is recorded at every step either way.
    kld_weight : float, default 1.0
        Weight of the KL divergence in the loss (the beta of a beta-VAE); no effect on AE and RAE.
    kld_warmup_epochs : float, default 0.0
        Epochs over which that weight rises linearly from 0, step by step. The validation loss always uses the full one.
    accumulate : int, default 1
        Batches whose gradients are gathered into one optimiser step. The step equals that of one batch of
        ``accumulate * batch_size`` rows, except for the statistics of BatchNorm, which are those of each batch, and for
        which random numbers a row draws.
    validation_fraction : float, default 0.0
        Share of the rows, drawn at random by ``seed``, held out when no ``validation`` data are given.
    patience : int or None, default None
        Stop after this many epochs without a lower validation loss; needs validation data.
    min_delta : float, default 0.0
        What counts as lower: by more than this.
    restore_best : bool, default True
        End with the weights of the epoch of lowest validation loss. Without validation data the last weights stay.
    precision : {"auto", "fp32", "bf16"}, default "auto"
        ``"bf16"`` runs forward and backward under autocast, weights and statistics staying fp32; ``"auto"`` chooses it
        where the device computes it natively (:func:`rvae_fast._precision.has_native_bf16`) and the model is fp32. On
        CPUs with AVX512_BF16 and without AMX it pays from a width of about 128; below, ``"fp32"`` is faster.
    seed : int or None, default None
        Seeds the order of rows, the validation split, the sampling of z and dropout. None draws one number from torch's
        global generator, so ``torch.manual_seed`` decides. Either way it is the only thing the run takes from that
        generator, whose state is otherwise left alone.
    device : str, default "auto"
        ``"auto"``: the model's own when it is not the CPU, else a CUDA device where there is one, else the CPU.
    progress : bool, default False
        A progress bar in a terminal, a line every few seconds elsewhere, on standard error.
    checkpoint : path or None, default None
        File that the state of the run is kept in, replaced atomically. Where it cannot be written at the start, that is
        an error; later, on a disk that has become full, a warning.
    checkpoint_every : int, default 1
        How often, in ``checkpoint_unit``.
    checkpoint_unit : {"epochs", "steps"}, default "epochs"
    sync_every : int or None, default None
        Steps between readings of loss and gradient norm from the device. None means every step on the CPU, where it
        costs nothing, and every 50 elsewhere. A non-finite value blocks every later update on the device itself, so the
        interval changes when an error is raised, never which weights are kept.
    cuda_graph : {"auto", True, False}, default "auto"
        Run optimiser steps as one CUDA graph: hundreds of kernels in one launch, which pays where the network is deep
        and the batches small. ``"auto"`` takes the first steps eagerly, the next by a graph, and keeps the faster way;
        a step that cannot be captured stays eager, with a warning. True captures or fails. Batches of another size (an
        epoch's last) always run eagerly. The numbers are those of eager steps. Elsewhere than on CUDA devices, for
        models in fp64 and with ``"radam"``, ``"auto"`` means False and True is an error.

    Raises
    ------
    TypeError, ValueError
        Naming the field, what came and what was expected.
    """

    epochs: int = 100
    batch_size: int = 256
    optimizer: str = "adamw"
    learning_rate: float | str = "auto"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_epochs: float | str = "auto"
    schedule: str = "cosine"
    final_learning_rate: float = 0.0
    max_grad_norm: float | None = 10.0
    kld_weight: float = 1.0
    kld_warmup_epochs: float = 0.0
    accumulate: int = 1
    validation_fraction: float = 0.0
    patience: int | None = None
    min_delta: float = 0.0
    restore_best: bool = True
    precision: str = "auto"
    seed: int | None = None
    device: str = "auto"
    progress: bool = False
    checkpoint: str | None = None
    checkpoint_every: int = 1
    checkpoint_unit: str = "epochs"
    sync_every: int | None = None
    cuda_graph: bool | str = "auto"

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, low in (("epochs", 1), ("batch_size", 2), ("accumulate", 1), ("checkpoint_every", 1)):
            put(name, _integer(name, getattr(self, name), low))
        for name in ("patience", "sync_every"):
            if getattr(self, name) is not None:
                put(name, _integer(name, getattr(self, name), 1, "or None"))
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, "or None", high=2**63 - 1))
        put("eps", _number("eps", self.eps, 0.0, _INF, low_open=True))
        if not _is_auto(self.learning_rate):
            put("learning_rate", _number("learning_rate", self.learning_rate, 0.0, _INF, low_open=True, also=_OR_AUTO))
        if not _is_auto(self.warmup_epochs):
            put("warmup_epochs", _number("warmup_epochs", self.warmup_epochs, 0.0, _INF, also=_OR_AUTO))
        for name in _AT_LEAST_0:
            put(name, _number(name, getattr(self, name), 0.0, _INF))
        if self.max_grad_norm is not None:
            put("max_grad_norm", _number("max_grad_norm", self.max_grad_norm, 0.0, _INF, low_open=True, also="or None"))
        put("validation_fraction", _number("validation_fraction", self.validation_fraction, 0.0, 1.0))
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        put("betas", tuple(_number("betas", beta, 0.0, 1.0) for beta in self.betas))
        highest = LEARNING_RATE if _is_auto(self.learning_rate) else float(self.learning_rate)
        if self.final_learning_rate > highest:
            limit = f"at most learning_rate ({highest})"
            raise ValueError(f"final_learning_rate must be {limit}, got {self.final_learning_rate}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("restore_best", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.cuda_graph, bool) and self.cuda_graph != "auto":
            raise ValueError(f"cuda_graph must be 'auto', True or False, got {self.cuda_graph!r}")
        put("device", str(self.device))
        if self.checkpoint is not None:
            if not isinstance(self.checkpoint, (str, os.PathLike)) or not os.fspath(self.checkpoint):
                raise TypeError(f"checkpoint must be a path or None, got {self.checkpoint!r}")
            put("checkpoint", str(os.fspath(self.checkpoint)))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; ``TrainingConfig(**config.to_dict())`` equals ``config``."""
        fields = dataclasses.asdict(self)
        fields["betas"] = list(self.betas)
        return fields


_AT_LEAST_0 = ("weight_decay", "final_learning_rate", "kld_weight", "kld_warmup_epochs", "min_delta")
_OR_AUTO = "or 'auto'"
_CHOICES = {
    "optimizer": ("adamw", "adam", "radam"),
    "schedule": ("cosine", "linear", "constant"),
    "precision": ("auto", "fp32", "bf16"),
    "checkpoint_unit": ("epochs", "steps"),
}


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def _integer(name: str, value: Any, low: int, also: str = "", *, high: int | None = None) -> int:
    expected = f"{name} must be an integer of at least {low}" + (f" {also}" if also else "")
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{expected}, got {value!r}")
    result = int(value)
    if result < low or (high is not None and result > high):
        raise ValueError(f"{expected}{f' and at most {high}' if high is not None else ''}, got {value!r}")
    return result


def _number(name: str, value: Any, low: float, high: float, *, low_open: bool = False, also: str = "") -> float:
    """A finite number in ``[low, high)``, or in ``(low, high)``."""
    if high == _INF:
        bounds = f"{'above' if low_open else 'of at least'} {low:g}"
    else:
        bounds = f"in [{low:g}, {high:g})"
    expected = f"{name} must be a finite number {bounds}" + (f" {also}" if also else "")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{expected}, got {value!r}")
    result = float(value)
    if not (low < result if low_open else low <= result) or not result < high:  # NaN fails both
        raise ValueError(f"{expected}, got {value!r}")
    return result


def check_resume(resume: object, config: TrainingConfig) -> None:
    """Raise a ValueError unless ``resume`` is one of its values, and there is a checkpoint to resume from."""
    if resume not in (True, False, "auto"):
        raise ValueError(f"resume must be True, False or 'auto', got {resume!r}")
    if resume and config.checkpoint is None:
        raise ValueError("config.checkpoint must be a path when resume is set, got None")

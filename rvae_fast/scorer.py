"""A trained model frozen into a scorer: BatchNorms folded, weights packed once, rows to scores in one native call.

The program of a frozen network is a list of steps. The first loads the rows; every other one is a linear layer with
what follows it::

    y = input W^T + b (+ stream)      add       the residual connection
    y = act(y)                        first     post-activation units and plain layers
    stream = y                        store     where a residual unit starts
    next input = act(y * scale + shift)         the next BatchNorm, where the stream's own value is needed as well

A BatchNorm that reads a layer's output and nothing else does is folded into that layer (in fp64). The kernel is in
``csrc/cpu/scorer.cpp``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rvae_fast import _native
from rvae_fast._activations import ACTIVATIONS, Activation
from rvae_fast.models import MODELS, Autoencoder
from rvae_fast.nn import ResidualBlock, ResidualStack, Transition
from rvae_fast.ops.residual_stack import HAS_BF16_PRODUCTS

PRECISIONS = ("auto", "fp32", "bf16")

_library = torch.library.Library("rvae_fast", "FRAGMENT")
_library.define(
    "score(Tensor x, Tensor program, Tensor weights, Tensor vectors, int latent, bool variational, float low, "
    "float high, str likelihood, int activation, float negative_slope, bool bf16, bool want_kld, bool want_latent, "
    "bool want_reconstruction, bool want_feature_error) -> Tensor[]"
)
_library.define("score_pack(Tensor[] weights, bool bf16) -> Tensor")
_library.define("score_products(Tensor program, Tensor weights, int rows, bool bf16) -> ()")
_library.define("score_state(Tensor[] tensors) -> int")
_score_op = torch.ops.rvae_fast.score.default
_pack_op = torch.ops.rvae_fast.score_pack.default

_HAS_KERNELS: bool = _native.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
    "rvae_fast::score", "CPU"
)
#: For each backend that has a scorer, the device types it covers.
IMPLEMENTED: dict[str, tuple[str, ...]] = {"native": ("cpu",)} if _HAS_KERNELS else {}


class Scores(NamedTuple):
    """What :meth:`Scorer.detailed` returns for rows ``[batch, in_features]``; all fp32, None where not asked for."""

    #: Reconstruction error of each row, summed over features ``[batch]``.
    error: Tensor
    #: KL divergence of each row's posterior from the standard normal ``[batch]``; zeros for AE and RAE.
    kld: Tensor | None
    #: The code, for a VAE the mean of its posterior ``[batch, latent_features]``.
    latent: Tensor | None
    #: ``[batch, in_features]`` (for ``likelihood="bernoulli"`` probabilities).
    reconstruction: Tensor | None
    #: Each feature's part of ``error`` ``[batch, in_features]``.
    feature_error: Tensor | None


@dataclass
class _Step:
    """One step; vectors, and weights once something is folded into them, are fp64 until the program is written."""

    width: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    add: bool = False
    first: bool = False
    store: bool = False
    last: bool = False
    is_code: bool = False

    def fold(self, scale: Tensor, shift: Tensor) -> None:
        """Append ``y * scale + shift`` to the layer."""
        assert self.weight is not None
        bias = torch.zeros_like(shift) if self.bias is None else self.bias
        self.weight, self.bias = scale[:, None] * self.weight, scale * bias + shift


class Scorer:
    """A frozen model: rows to anomaly scores. Made by :func:`freeze`.

    Attributes
    ----------
    in_features, latent_features : int
    precision : {"fp32", "bf16"}
        Of the products; scores and sums are fp32.
    backend : {"native", "reference"}
        ``"reference"`` where the native kernels do not cover the model (no native module, fp64 parameters): a copy of
        the model then scores in plain PyTorch.

    Notes
    -----
    It keeps nothing between calls: any number of threads may score with one scorer, the GIL is released meanwhile, and
    rows are divided among PyTorch's threads (``torch.set_num_threads``). It can be copied and pickled.
    """

    def __init__(self, model: Autoencoder, precision: str) -> None:
        self.in_features = model.in_features
        self.latent_features = model.latent_features
        self.precision = precision
        self._likelihood = model.likelihood
        self._model: Autoencoder | None = None
        if not _covers(model):
            self.backend = "reference"
            self._model = copy.deepcopy(model).eval().requires_grad_(False)
            return
        self.backend = "native"
        config = model.config()
        program, weights, vectors = _write(_steps(model), precision == "bf16")
        self._program = (program, weights, vectors)
        self._options = (
            model.latent_features, model.is_variational, *config["logvar_range"], model.likelihood,
            ACTIVATIONS.index(config["activation"]), config["negative_slope"], precision == "bf16",
        )  # fmt: skip

    def __call__(self, x: Tensor, kld_weight: float = 0.0) -> Tensor:
        """Score rows as ``model.anomaly_score`` does: higher is more anomalous.

        Parameters
        ----------
        x : Tensor [batch, in_features]
            Floating point; computed in fp32.
        kld_weight : float, default 0.0
            Weight of the KL divergence beside the reconstruction error.

        Returns
        -------
        Tensor [batch] fp32
        """
        if not kld_weight:
            return self.detailed(x).error
        scores = self.detailed(x, kld=True)
        assert scores.kld is not None
        return scores.error + kld_weight * scores.kld

    @torch.no_grad()
    def detailed(
        self,
        x: Tensor,
        *,
        kld: bool = False,
        latent: bool = False,
        reconstruction: bool = False,
        feature_error: bool = False,
    ) -> Scores:
        """The reconstruction error of rows and, where asked for, what it is made of.

        Raises
        ------
        TypeError, ValueError
            If ``x`` is not a floating-point tensor ``[batch, in_features]`` on the CPU.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point torch.Tensor, got {got}")
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x must have shape [batch, {self.in_features}], got {list(x.shape)}")
        if x.device.type != "cpu":
            raise ValueError(f"x must be on the CPU, where the scorer is, got {x.device}")
        if self._model is not None:
            return self._by_reference(x, kld, latent, reconstruction, feature_error)
        wanted = (kld, latent, reconstruction, feature_error)
        error, *others = _score_op(x, *self._program, *self._options, *wanted)
        return Scores(error, *(t if asked else None for t, asked in zip(others, wanted, strict=True)))

    def _by_reference(self, x: Tensor, kld: bool, latent: bool, reconstruction: bool, feature_error: bool) -> Scores:
        model = self._model
        assert model is not None
        x = x.to(next(model.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            error, divergence = model.loss_terms(x)
            out = model(x)
            features = model.feature_errors(x) if feature_error else None
        return Scores(
            error.float(),
            divergence.float() if kld else None,
            out.z.float() if latent else None,
            out.reconstruction.float() if reconstruction else None,
            None if features is None else features.float(),
        )


def freeze(model: Autoencoder, precision: str = "auto") -> Scorer:
    """Freeze a trained model into a scorer on the CPU.

    The scorer is a copy: later training does not change it. It computes what ``model.anomaly_score`` does, from the
    running statistics of the BatchNorms.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE
    precision : {"auto", "fp32", "bf16"}, default "auto"
        Of the matrix products. ``"auto"`` is fp32: a small reconstruction error is the difference of nearly equal
        numbers, of which bf16 keeps three digits. ``"bf16"`` ranks rows the same way where errors differ by more than
        that, up to twice as fast on CPUs with AVX512_BF16 and faster still with AMX.

    Returns
    -------
    Scorer

    Raises
    ------
    TypeError
        If ``model`` is not one of this package's models.
    ValueError
        An unknown precision, bf16 where the CPU has no bf16 products, or a BatchNorm without running statistics (it has
        no fixed transformation to fold).

    Examples
    --------
    >>> import torch
    >>> from rvae_fast import RVAE, freeze
    >>> scorer = freeze(RVAE(64, latent_features=8, n_layers=7))
    >>> scorer(torch.rand(5, 64)).shape
    torch.Size([5])
    """
    if not isinstance(model, Autoencoder):
        raise TypeError(f"model must be an AE, RAE, VAE or RVAE, got {type(model).__name__}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if precision == "bf16" and not HAS_BF16_PRODUCTS:
        raise ValueError(
            "precision must be 'fp32' or 'auto' here: bf16 products need the native module (see rvae-fast doctor) "
            "and a CPU with AVX512_BF16 or AMX"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d) and module.running_mean is None:
            raise ValueError(f"model: {name} has no running statistics, so that rows cannot be scored one by one")
    return Scorer(model, "fp32" if precision == "auto" else precision)


def freezable(model: nn.Module, precision: str = "auto") -> bool:
    """Whether :func:`freeze` gives a native scorer of this model, rather than a copy that runs in plain PyTorch."""
    return (
        isinstance(model, Autoencoder)
        and _covers(model)
        and (precision != "bf16" or HAS_BF16_PRODUCTS)
        and not any(isinstance(m, nn.BatchNorm1d) and m.running_mean is None for m in model.modules())
    )


def _covers(model: Autoencoder) -> bool:
    """Whether the kernels run this model: one of the package's own, all of it fp32 (a copy goes to the CPU), of modules
    that they know with the options that the model was made with, and no hook waiting for one of them to be called."""
    if not _HAS_KERNELS or type(model) not in MODELS.values():
        return False
    if any(t.dtype != torch.float32 for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False
    config = model.config()
    same = {name: config[name] for name in ("activation", "negative_slope")}
    for module in (*model.encoder, *model.decoder):
        if type(module) is ResidualStack:
            for block in module:
                if type(block) is not ResidualBlock or block.order != config["order"] or not _has(block, same):
                    return False
                if not all(type(m) in _LAYERS for m in (*block.norms, *block.linears)):
                    return False
        elif type(module) is Activation:
            if not _has(module, same):
                return False
        elif type(module) not in _LAYERS:
            return False
    return True


_LAYERS = (nn.Linear, Transition, nn.BatchNorm1d)


def _has(module: nn.Module, options: dict[str, Any]) -> bool:
    return all(getattr(module, name) == value for name, value in options.items())


# --- from modules to steps ---


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval as ``x * scale + shift``, in fp64."""
    scale = 1.0 / torch.sqrt(_double(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * _double(norm.weight)
    shift = -_double(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + _double(norm.bias)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _linear(linear: Any) -> _Step:
    bias = None if linear.bias is None else _double(linear.bias)
    return _Step(linear.weight.shape[0], linear.weight.detach().cpu(), bias)


def _append_unit(steps: list[_Step], block: Any) -> None:
    steps[-1].store = True
    for k, (norm, linear) in enumerate(zip(block.norms, block.linears, strict=True)):
        before, layer = steps[-1], _linear(linear)
        if block.order == "pre":
            if k == 0:  # reads the stream, whose own value the addition needs
                before.scale, before.shift = _affine(norm)
            else:
                before.fold(*_affine(norm))
            before.last = True
        else:
            layer.fold(*_affine(norm))
            layer.first = True
        steps.append(layer)
    steps[-1].add = True


@torch.no_grad()
def _steps(model: Autoencoder) -> list[_Step]:
    steps = [_Step(model.in_features)]
    for part in (model.encoder, model.decoder):
        for module in part:
            if isinstance(module, ResidualStack):
                for block in module:
                    _append_unit(steps, block)
            elif isinstance(module, nn.Linear):
                steps.append(_linear(module))
            elif isinstance(module, nn.BatchNorm1d):
                steps[-1].fold(*_affine(module))
            else:
                steps[-1].first = True
        if part is model.encoder:
            steps[-1].is_code = True
    return steps


# --- from steps to what the kernel reads ---


def _write(steps: list[_Step], bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The program [steps, 11], the packed weights, and the vectors, each padded with zeros to whole panels of 32."""
    rows: list[list[int]] = []
    weights: list[Tensor] = []
    vectors: list[Tensor] = []
    sizes = [0, 0]

    def put(vector: Tensor | None) -> int:
        if vector is None:
            return -1
        start = sizes[1]
        vectors.append(nn.functional.pad(vector.float(), (0, -len(vector) % 32)))
        sizes[1] += len(vectors[-1])
        return start

    for step in steps:
        reads, weight = 0, -1
        if step.weight is not None:
            reads, weight = step.weight.shape[1], sizes[0]
            weights.append(step.weight.float())
            sizes[0] += _packed_words(weights[-1], bf16)
        flags = (step.add, step.first, step.store, step.last, step.is_code)
        offsets = (put(step.bias), put(step.scale), put(step.shift))
        rows.append([reads, step.width, weight, *offsets, *(int(flag) for flag in flags)])
    return torch.tensor(rows), _pack_op(weights, bf16), torch.cat(vectors) if vectors else torch.zeros(0)


def _packed_words(weight: Tensor, bf16: bool) -> int:
    """32-bit words of a packed weight ``[out, in]``: panels of 32 outputs, each whole lines of 16 along ``in``."""
    reduced = -(-weight.shape[1] // 2) if bf16 else weight.shape[1]
    return -(-weight.shape[0] // 32) * 32 * (reduced + -reduced % 16)

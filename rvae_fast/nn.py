"""Residual blocks as modules: parameters and state; the mathematics is in :mod:`rvae_fast.ops`.

The blocks hold ordinary ``nn.BatchNorm1d`` and ``nn.Linear`` submodules, so a state dict moves between them and the
same block written by hand. A block reads their parameters and buffers and runs the whole unit at once; where one of
them was replaced, has hooks or a ``forward`` of its own, it calls them one by one, as the block written by hand does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rvae_fast import _backend
from rvae_fast._activations import Activation, activate, check_activation
from rvae_fast._architecture import check_norm_options, positive_int
from rvae_fast._norms import advance, averages, untouched, values, watched
from rvae_fast.ops.plain_stack import Lists, Options, plain_stack, products_dtype
from rvae_fast.ops.residual_stack import residual_stack

ORDERS = ("pre", "post")


def check_rows(name: str, x: Any, features: int) -> None:
    """Raise an error that names the argument unless ``x`` is a floating-point tensor ``[batch, features]``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape [batch, {features}], got {type(x).__name__}")
    if x.dim() != 2 or x.shape[1] != features:
        raise ValueError(f"{name} must have shape [batch, {features}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}")


def _run(blocks: Sequence[Any], input: Tensor) -> Tensor:
    """Run units that differ in nothing but their parameters and state, as one op."""
    first = blocks[0]
    norms, linears = ([module for block in blocks for module in _members(block, name)] for name in _MEMBERS)
    batch_stats, momentum = advance(norms)
    return residual_stack(
        input,
        *(values(linears, name) for name in ("weight", "bias")),
        *(values(norms, name) for name in ("weight", "bias")),
        *(averages(norms, name) for name in ("running_mean", "running_var")),
        layers=first.layers,
        order=first.order,
        activation=first.activation,
        negative_slope=first.negative_slope,
        eps=norms[0].eps,
        momentum=momentum,
        batch_stats=batch_stats,
        dropout=first.dropout if first.training else 0.0,
    )


_MEMBERS = ("norms", "linears")


def _members(block: Any, name: str) -> list[Any]:
    # Past the ``__getattr__`` of two modules and ``ModuleList``'s iterator: deep stacks would notice.
    return list(block._modules[name]._modules.values())


def _options(block: Any) -> tuple[Any, ...] | None:
    """What units that run as one op have in common; None where the modules of this one have to be called.

    The modules must be those that it was made with, or do the same.
    """
    norms, linears = _members(block, "norms"), _members(block, "linears")
    if not len(norms) == len(linears) == block.layers or not untouched(linears, nn.Linear):
        return None
    eps = norms[0].eps
    if not untouched(norms, nn.BatchNorm1d) or any(norm.eps != eps for norm in norms):
        return None
    dropout = block.dropout if block.training else 0.0
    return block.layers, block.order, block.activation, block.negative_slope, eps, dropout


def alike(blocks: Sequence[Any]) -> bool:
    """Whether the units of a stack can run as one op: same options, and nothing waits for one of them to be called."""
    if not blocks or watched() or not untouched(blocks, ResidualBlock):
        return False
    first = _options(blocks[0])
    return first is not None and all(_options(block) == first for block in blocks[1:])


class ResidualBlock(nn.Module):
    """A residual unit of ``layers`` linear layers of constant width, for rows ``[batch, features]``.

    ``order="pre"`` is the identity unit with full pre-activation (He et al. 2016b), the article's: BatchNorm ->
    activation -> Linear, ``layers`` times, and nothing after the addition. ``order="post"`` is the original unit
    (He et al. 2016a): Linear -> BatchNorm -> activation, the last activation after the addition.

    Parameters
    ----------
    features : int
        Width of the rows, in and out.
    layers : int, default 2
        Linear layers the skip connection passes over (the article's K).
    order : {"pre", "post"}, default "pre"
    activation : {"identity", "relu", "leaky_relu", "elu", "silu", "gelu", "tanh"}, default "leaky_relu"
    negative_slope : float, default 0.01
        LeakyReLU's slope below zero.
    eps, momentum, affine, track_running_stats
        As ``nn.BatchNorm1d``: biased variance to normalise, unbiased into ``running_var``, ``momentum=None`` for a
        cumulative average.
    bias : bool, default True
        Whether the linear layers have one.
    dropout : float, default 0.0
        Probability of zeroing an element of the branch before it is added to the input. Zero while not training.
    zero_init : bool, default False
        Start as the identity: the branch's last parameters (``pre``: last linear layer; ``post``: last BatchNorm's
        weight) are zero. A net of any depth then starts as shallow as its transitions, which is what lets 100 and more
        layers train (Goyal et al. 2017, section 5.1; Zhang et al. 2019, "Fixup"). With ``order="post"`` it needs
        ``affine=True``.
    device, dtype
        Of the parameters.

    Raises
    ------
    TypeError, ValueError
        Naming the argument. A single row in training mode is a ValueError, as in ``nn.BatchNorm1d``.

    Notes
    -----
    Parameters and buffers are ``norms.{i}.*`` and ``linears.{i}.*``: the names of a block written with
    ``nn.ModuleList`` of ``nn.BatchNorm1d`` and ``nn.Linear``.

    Examples
    --------
    >>> import torch
    >>> from rvae_fast import ResidualBlock
    >>> ResidualBlock(64)(torch.randn(32, 64)).shape
    torch.Size([32, 64])
    """

    def __init__(
        self,
        features: int,
        *,
        layers: int = 2,
        order: str = "pre",
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = positive_int("features", features)
        self.layers = positive_int("layers", layers)
        if order not in ORDERS:
            raise ValueError(f"order must be 'pre' or 'post', got {order!r}")
        check_activation(activation, negative_slope)
        check_norm_options(eps, momentum)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        if zero_init and order == "post" and not affine:
            raise ValueError("zero_init with order='post' zeroes the last BatchNorm's weight: it needs affine=True")
        self.order = order
        self.activation = activation
        self.negative_slope = float(negative_slope)
        self.eps = float(eps)
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.dropout = float(dropout)
        self.zero_init = zero_init
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(features, eps, momentum, affine, track_running_stats, **factory) for _ in range(layers)
        )
        self.linears = nn.ModuleList(nn.Linear(features, features, bias, **factory) for _ in range(layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew: PyTorch's defaults for each layer, then, with ``zero_init``, the identity."""
        for module in (*self.norms, *self.linears):
            module.reset_parameters()
        if self.zero_init:
            last: Any = self.linears[-1] if self.order == "pre" else self.norms[-1]
            nn.init.zeros_(last.weight)
            if last.bias is not None:
                nn.init.zeros_(last.bias)

    def forward(self, input: Tensor) -> Tensor:
        check_rows("input", input, self.features)
        return self._call_modules(input) if watched() or _options(self) is None else _run([self], input)

    def _call_modules(self, input: Tensor) -> Tensor:
        """The unit, module by module."""
        if _backend.current_backend() == "triton":
            raise RuntimeError(
                "backend 'triton' was asked for and does not cover a ResidualBlock with replaced modules, hooks, or "
                "norms that differ in eps; use backend('auto')"
            )
        h, last = input, len(self.linears) - 1
        for i, (norm, linear) in enumerate(zip(self.norms, self.linears, strict=True)):
            if self.order == "pre":
                h = linear(activate(norm(h), self.activation, self.negative_slope))
            else:
                h = norm(linear(h))
                if i < last:
                    h = activate(h, self.activation, self.negative_slope)
        h = input + nn.functional.dropout(h, self.dropout, self.training)
        return h if self.order == "pre" else activate(h, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        parts = [f"{self.features}, layers={self.layers}, order={self.order!r}, activation={self.activation!r}"]
        if self.activation == "leaky_relu":
            parts.append(f"negative_slope={self.negative_slope}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        return ", ".join(parts)


class ResidualStack(nn.Sequential):
    """``blocks`` residual units of one width in a row; every keyword is :class:`ResidualBlock`'s.

    State-dict keys are those of ``nn.Sequential``: ``{block}.norms.{i}.*``, ``{block}.linears.{i}.*``.

    Parameters
    ----------
    features : int
        Width of the rows ``[batch, features]``, in and out.
    blocks : int
        How many units; 0 is the identity.
    **block_options
        Passed to every :class:`ResidualBlock`.
    """

    def __init__(self, features: int, blocks: int, **block_options: Any) -> None:
        self_features = positive_int("features", features)
        super().__init__(*(ResidualBlock(features, **block_options) for _ in range(positive_int("blocks", blocks, 0))))
        self.features = self_features

    def __getitem__(self, idx: Any) -> Any:
        """The block at a place, or the stack of the blocks of a slice, under the names they have here."""
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        part = ResidualStack(self.features, 0)
        part._modules.update(list(self._modules.items())[idx])
        return part

    def forward(self, input: Tensor) -> Tensor:
        check_rows("input", input, self.features)
        blocks = list(self)
        return _run(blocks, input) if alike(blocks) else super().forward(input)


class PlainStack(nn.Sequential):
    """Layers without skip connections: Linear -> BatchNorm -> activation, repeatedly, and a bare Linear at the end.

    It takes, names and holds modules as ``nn.Sequential`` does. Where they are ``nn.Linear``, ``nn.BatchNorm1d`` and
    :class:`~rvae_fast._activations.Activation` in this order, with one activation and one ``eps`` and without hooks,
    and the native kernels cover the call, all layers run as one op; else the modules are called one by one, and the
    numbers agree to rounding.
    """

    def forward(self, input: Tensor) -> Tensor:
        call = self.as_one_op(input)
        if call is None or input.shape[1] != call.lists[0][0].shape[1]:
            return super().forward(input)
        momentum = self.advance(call)
        return plain_stack(
            input, call.lists, call.options, momentum=momentum, batch_stats=call.batch_stats, dtype=call.dtype
        )

    def as_one_op(self, rows: Tensor) -> PlainCall | None:
        """The layers as arguments of the op, if it covers them and such rows (whatever their width) as things are."""
        modules: list[Any] = list(self._modules.values())
        if not isinstance(rows, Tensor) or not _is_plain(modules):
            return None
        linears, norms, activation = modules[0::3], modules[1::3], modules[2]
        batch_stats = [norm.training or norm.running_mean is None for norm in norms]
        lists = [values(part, name) for part in (linears, norms) for name in ("weight", "bias")]
        lists += [averages(norms, name) for name in ("running_mean", "running_var")]
        # A list is whole or empty; one with gaps is the modules' to run.
        if any((tensor is None) != (tensors[0] is None) for tensors in lists for tensor in tensors):
            return None
        found: Any = tuple([] if tensors[0] is None else tensors for tensors in lists)
        dtype = products_dtype(rows, found, batch_stats)
        if dtype is None:
            return None
        options = Options(activation.activation, activation.negative_slope, norms[0].eps)
        return PlainCall(found, norms, options, batch_stats[0], dtype)

    @staticmethod
    def advance(call: PlainCall) -> list[float]:
        """Count the batch in the norms; the weight of the batch in each running average."""
        return advance(call.norms)[1]


class PlainCall(NamedTuple):
    """What :meth:`PlainStack.as_one_op` found; see :func:`rvae_fast.ops.plain_stack.plain_stack`."""

    lists: Lists
    norms: Sequence[nn.BatchNorm1d]
    options: Options
    batch_stats: bool
    dtype: torch.dtype


def _is_plain(modules: Sequence[Any]) -> bool:
    """Whether these are Linear, BatchNorm, activation, ..., Linear, alike and with nothing waiting for one of them."""
    if len(modules) < 4 or len(modules) % 3 != 1 or watched():
        return False
    first_norm, first = modules[1], modules[2]
    for i, module in enumerate(modules):
        if type(module) is not _PLAIN[i % 3] or not untouched((module,), _PLAIN[i % 3]):
            return False
        if i % 3 == 1 and module.eps != first_norm.eps:
            return False
        if i % 3 == 2 and (module.activation, module.negative_slope) != (first.activation, first.negative_slope):
            return False
    return True


_PLAIN = (nn.Linear, nn.BatchNorm1d, Activation)


class Transition(nn.Linear):
    """The plain linear layer between two stages: ``[batch, in_features] -> [batch, out_features]``.

    ``nn.Linear`` in every way, its start included: weights of variance 1 / (3 in_features) shrink a row by 1.7 at each
    transition, so that a network of zero-initialised units begins by reconstructing little. Starting at the row's own
    scale (variance 1 / in_features) gave a first-epoch loss three times as high on MNIST and a lower AUROC.

    Under CPU autocast to bf16 it runs on the native kernels, as a plain stack of one layer: a twentieth to a third
    faster than PyTorch's, which casts weights and gradients in passes of their own. In fp32 it gains nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        check_rows("input", input, self.in_features)
        if not torch.compiler.is_compiling() and torch.is_autocast_enabled("cpu"):
            lists: Lists = ([self.weight], [] if self.bias is None else [self.bias], [], [], [], [])
            if products_dtype(input, lists, (True,)) == torch.bfloat16:
                return plain_stack(
                    input, lists, BARE, momentum=(), batch_stats=True, dtype=torch.bfloat16
                )  # no norm, no activation
        return super().forward(input)


BARE = Options("identity", 0.0, 1e-5)

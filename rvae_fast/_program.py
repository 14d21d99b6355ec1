"""The program of a frozen network: what its modules are to the native scorer.

The program is a list of steps. The first loads the rows; every other one is a linear layer with what follows it::

    y = input W^T + b (+ stream)      add       the residual connection
    y = act(y)                        first     post-activation units and plain layers
    stream = y                        store     where a residual unit starts
    next input = act(y * scale + shift)         the next BatchNorm, where the stream's own value is needed as well

A BatchNorm that reads a layer's output and nothing else does is folded into that layer (in fp64). The kernel is in
``csrc/cpu/scorer.cpp``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rvae_fast.models import Autoencoder
from rvae_fast.nn import ResidualStack

_library = torch.library.Library("rvae_fast", "FRAGMENT")
_library.define("score_pack(Tensor[] weights, bool bf16) -> Tensor")
_pack_op = torch.ops.rvae_fast.score_pack.default


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
def steps_of(model: Autoencoder) -> list[_Step]:
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


def write(steps: list[_Step], bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
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
    return (
        torch.tensor(rows, device="cpu"),
        _pack_op(weights, bf16),
        torch.cat(vectors) if vectors else torch.zeros(0, dtype=torch.float32, device="cpu"),
    )


def _packed_words(weight: Tensor, bf16: bool) -> int:
    """32-bit words of a packed weight ``[out, in]``: panels of 32 outputs, each whole lines of 16 along ``in``."""
    reduced = -(-weight.shape[1] // 2) if bf16 else weight.shape[1]
    return -(-weight.shape[0] // 32) * 32 * (reduced + -reduced % 16)

"""What a step cannot do without: floating-point operations and bytes through memory, and the time that they take.

Counted a linear layer at a time, for ``in -> out`` features on B rows with s bytes an element (2 in bf16):

=========  ======================  =================================================================
pass       operations              bytes
=========  ======================  =================================================================
forward    2 B in out              s (B in + B out + in out): raw input read, raw output written
backward   4 B in out              s (B out + 2 B in + in out) + 4 in out: gradient and raw input read,
                                   gradient of the input and (fp32) of the weight written
=========  ======================  =================================================================

A residual unit reads its stream once more in either direction: 2 s B W. Of the loss: x (4 bytes) and x_hat read in both
directions, one gradient written. The optimiser: norm of the gradients (4 bytes a parameter), then weight, gradient and
two moments read, three of them written (28). Normalisations and activations are free: they ride along.

A pass takes at least the longer of its two times, and passes follow one another: the floor is the sum over passes of
``max(operations / rate, bytes / bandwidth)``, with the rates that this device reached in the same run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one pass."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Roof:
    """Operations and bytes a second that the device reaches."""

    flops: float
    bytes: float

    def seconds(self, passes: Iterable[Work]) -> float:
        """The least time of passes that follow one another."""
        return sum(max(work.flops / self.flops, work.bytes / self.bytes) for work in passes)


def total(passes: Iterable[Work]) -> Work:
    """Operations and bytes of several passes."""
    passes = list(passes)
    return Work(sum(w.flops for w in passes), sum(w.bytes for w in passes))


def linear(rows: int, inner: int, outer: int, size: int, *, training: bool) -> list[Work]:
    """Passes of one linear layer."""
    product = 2.0 * rows * inner * outer
    forward = Work(product, size * (rows * (inner + outer) + inner * outer))
    if not training:
        return [forward]
    return [forward, Work(2 * product, size * (rows * (outer + 2 * inner) + inner * outer) + 4 * inner * outer)]


def network(
    shapes: Iterable[tuple[int, int]], units: Iterable[int], rows: int, features: int, size: int, *, training: bool
) -> list[Work]:
    """Passes of an autoencoder with linear layers of ``shapes`` (in, out) and residual units of widths ``units``."""
    shapes = list(shapes)
    passes = [work for inner, outer in shapes for work in linear(rows, inner, outer, size, training=training)]
    directions = 2 if training else 1
    passes += [Work(0.0, directions * size * rows * width) for width in units]
    loss = rows * features * (4 + size)
    passes.append(Work(0.0, 2 * loss + rows * features * size if training else loss))
    if training:
        parameters = sum(inner * outer + outer for inner, outer in shapes)
        passes.append(Work(0.0, 32.0 * parameters))
    return passes


def loss(rows: int, features: int, latent: int, size: int, *, backward: bool) -> list[Work]:
    """Passes of ``reconstruction_kld``; the backward reads the inputs again and writes all gradients but that of x."""
    matrix, codes = rows * features * size, 2 * rows * latent * size
    passes = [Work(0.0, 2 * matrix + codes)]
    return [*passes, Work(0.0, 3 * matrix + 2 * codes)] if backward else passes

"""One optimiser step of a model on a group of batches, its record, and what happens when it goes wrong."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rvae_fast import _rng
from rvae_fast._direct_gradients import DirectGradients
from rvae_fast._graphs import StepGraph
from rvae_fast._history import STEP_COLUMNS, History
from rvae_fast._nonfinite import ActivationWatch, BufferGuard, NonFiniteError, find_in_rows, non_finite_weight
from rvae_fast._optimizer import Optimizer
from rvae_fast._precision import autocast
from rvae_fast._rows import Rows
from rvae_fast._schedule import Schedule
from rvae_fast.models import MODELS, Autoencoder

Group = list[tuple[int, int]]


def _rows(group: Group) -> int:
    return group[-1][1] - group[0][0]


def _may_draw(model: nn.Module) -> bool:
    """Whether a step may draw random numbers: of the package's models those that sample or drop out, any other."""
    if type(model) not in MODELS.values():
        return True
    assert isinstance(model, Autoencoder)
    return model.is_variational or any(getattr(module, "dropout", 0.0) for module in model.modules())


class Stepper:
    """Takes optimiser steps and writes them to a history.

    Loss and norm are read from the device every ``sync_every`` steps. Between two readings a non-finite value raises a
    flag on the device that stays up and makes every later update, and every later copy of the buffers, do nothing; so
    when the reading finds it, weights and statistics are those from before the bad step.

    With a ``graph``, steps on batches of ``graph_sizes`` rows may run as a CUDA graph. All that such a step reads lies
    in tensors that stay where they are: the rows of its batches, learning rate and KL weight, flag and buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        schedule: Schedule,
        history: History,
        *,
        seed: int,
        precision: str,
        sync_every: int,
        graph: StepGraph | None = None,
        graph_sizes: Sequence[int] = (),
    ) -> None:
        self.model, self.rows, self.schedule, self.history = model, rows, schedule, history
        self.seed, self.precision, self.sync_every = seed, precision, sync_every
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = Optimizer(parameters, schedule.config)
        self._direct = DirectGradients(model, parameters)
        self._draws = _may_draw(model)
        self._looked_for: Tensor | None = None
        self.guard = BufferGuard(model)
        self.order = torch.empty(0, dtype=torch.int64, device="cpu")
        #: True while an update is half made; if a run is broken off there, its state must not be saved.
        self.torn = False
        # fp32 whatever torch's default dtype: the kernels take no other.
        self._blocked = torch.zeros((), dtype=torch.float32, device=rows.device)
        self._pending: list[tuple[int, Group, Tensor]] = []
        self._graph, self._graph_sizes = graph, list(graph_sizes)
        self._inputs: list[Tensor] = []
        # On CUDA devices these are tensors in eager steps too, so that both ways give the same bits.
        self._immediate = sync_every == 1 and graph is None and rows.device.type != "cuda"
        self._learning_rate: Tensor | None = None
        self._kld_weight: Tensor | None = None
        if graph is not None or (rows.device.type == "cuda" and rows.dtype != torch.float64):
            self._learning_rate, self._kld_weight = torch.zeros(2, dtype=torch.float32, device=rows.device).unbind()

    def step(self, step: int, group: Group) -> None:
        """Optimiser step ``step`` (from 0) on batches ``group`` of :attr:`order`.

        Raises
        ------
        NonFiniteError
        """
        try:
            with _rng.turn() if self._draws else contextlib.nullcontext():
                if self._immediate:
                    self._immediate_step(step, group)
                else:
                    self._pending.append((step, group, self._deferred_step(step, group)))
        except BaseException:
            if not self.torn:  # in the forward or backward pass: the buffers may have moved, nothing else
                self.guard.restore()
            raise
        if len(self._pending) >= self.sync_every:
            self.read()

    def _immediate_step(self, step: int, group: Group) -> None:
        self._reseed(step)
        record, norm = self._gradient(self._batches(group), _rows(group), self.schedule.kld_weight(step))
        values = record.tolist()
        if not all(map(math.isfinite, values)):
            self._fail(step, group, values)
        self.torn = True
        self.optimizer.step(self.schedule.learning_rate(step), norm)
        self.guard.save()
        self.history.append_steps([values])
        self.torn = False

    def _deferred_step(self, step: int, group: Group) -> Tensor:
        """A step that the host need not wait for; returns its record."""
        learning_rate: float | Tensor = self.schedule.learning_rate(step)
        kld_weight: float | Tensor = self.schedule.kld_weight(step)
        if self._learning_rate is not None and self._kld_weight is not None:
            learning_rate = self._learning_rate.fill_(learning_rate)
            kld_weight = self._kld_weight.fill_(kld_weight)
        n = _rows(group)
        if self._graph is not None and [stop - start for start, stop in group] == self._graph_sizes:
            if not self._inputs:
                width, dtype = self.rows.n_features, self.rows.dtype
                self._inputs = [self._blocked.new_empty((size, width), dtype=dtype) for size in self._graph_sizes]
            for static, x in zip(self._inputs, self._batches(group), strict=True):
                static.copy_(x)
            record = self._graph.run(
                lambda: self._reseed(step), lambda: self._update(self._inputs, n, learning_rate, kld_weight)
            )
        else:
            self._reseed(step)
            record = self._update(self._batches(group), n, learning_rate, kld_weight)
        self.torn = False
        return record

    def _update(
        self, inputs: Iterable[Tensor], n: int, learning_rate: float | Tensor, kld_weight: float | Tensor
    ) -> Tensor:
        """Gradient and update, decided on the device, all of it in place; what a graph holds."""
        record, norm = self._gradient(inputs, n, kld_weight)
        self.torn = True
        self._blocked.copy_(torch.maximum(self._blocked, (~torch.isfinite(record)).any().float()))
        self.optimizer.step(learning_rate, norm, self._blocked)
        self.guard.save(self._blocked)
        return record

    def _reseed(self, step: int) -> None:
        _rng.reseed(self.rows.device, _rng.derive(self.seed, "step", step))

    def _batches(self, group: Group) -> Iterator[Tensor]:
        """The rows of each batch, valid until the next one is asked for."""
        for start, stop in group:
            yield self.rows.gather(self.order[start:stop])

    def read(self) -> None:
        """Bring the record up to date with the device.

        Raises
        ------
        NonFiniteError
            When one of the steps since the last reading was not finite.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        rows = torch.stack([record for _, _, record in pending]).tolist()
        good = next((i for i, row in enumerate(rows) if not all(map(math.isfinite, row))), len(rows))
        self.history.append_steps(rows[:good])
        if good < len(rows):
            step, group, _ = pending[good]
            self._fail(step, group, rows[good])

    def _gradient(self, inputs: Iterable[Tensor], n: int, kld_weight: float | Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss over ``n`` rows in all; the step's record ``[4]`` and the gradient norm."""
        self.optimizer.zero_grad()
        total: list[Tensor] = []
        direct = not isinstance(kld_weight, Tensor)
        for x in inputs:
            if direct and self._looked_for is not self.order:  # the first step of an epoch
                with autocast(self.precision, self.rows.device):
                    self._direct.look(x)
                self._looked_for = self.order
            part = self._direct(x, n, float(kld_weight), add=bool(total)) if direct else None
            if part is None:
                direct = False
                error, kld = self._terms(x)
                # Sums over n, not means over batches: a shorter last batch weighs what its rows weigh.
                error, kld = error.sum() / n, kld.sum() / n
                loss = error + kld_weight * kld
                loss.backward()
                part = torch.stack((loss.detach(), error.detach(), kld.detach()))
            total = [total[0] + part] if total else [part]
        norm = self.optimizer.norm()
        return torch.cat((total[0], norm.to(total[0].dtype).view(1))), norm

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.precision, self.rows.device):
            error, kld = self.model.loss_terms(x)  # type: ignore[operator]
        for name, term in (("error", error), ("kld", kld)):
            if list(term.shape) != [x.shape[0]]:  # a mean would be divided by the number of rows once more
                raise ValueError(
                    f"model.loss_terms must return one error and one kld a row, each of shape [{x.shape[0]}]; "
                    f"{name} has {list(term.shape)}"
                )
        return error, kld

    def _fail(self, step: int, group: Group, values: list[float]) -> None:
        self.guard.restore()
        try:
            with _rng.turn():
                tensor, why = self._diagnose(step, group)
        finally:
            self.guard.restore()
            self.optimizer.zero_grad()
        epoch = step // self.schedule.steps_per_epoch + 1
        record = ", ".join(f"{name} {value:g}" for name, value in zip(STEP_COLUMNS, values, strict=True))
        raise NonFiniteError(
            f"non-finite value in {tensor} at epoch {epoch}, step {step + 1}: {why} ({record}). "
            "The model keeps the weights of the step before.",
            epoch=epoch,
            step=step + 1,
            tensor=tensor,
        )

    def _diagnose(self, step: int, group: Group) -> tuple[str, str]:
        """Run the step again, random numbers and all, and say where the first non-finite value is."""
        if (name := non_finite_weight(self.model)) is not None:
            return name, "the weights themselves are not finite; is the learning rate too high?"
        self._reseed(step)
        self.optimizer.zero_grad()
        kld_weight = self.schedule.kld_weight(step)
        n = _rows(group)
        for start, stop in group:
            index = self.order[start:stop]
            x = self.rows.gather(index)
            if (found := find_in_rows(x, index)) is not None:
                return self.rows.name, "row {}, column {} of the input is {}".format(*found)
            watch = ActivationWatch(self.model)
            try:
                error, kld = self._terms(x)
            finally:
                watch.close()
            where = f"; the first module with a non-finite output is {watch.first!r}" if watch.first else ""
            for name, term in (("error", error), ("kld", kld)):
                bad = (~torch.isfinite(term)).nonzero()
                if len(bad):
                    row = int(index[int(bad[0])])
                    return name, f"row {row} of the input has {name} {float(term.detach()[bad[0]]):g}{where}"
            ((error.sum() + kld_weight * kld.sum()) / n).backward()
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return f"{name}.grad", "loss terms are finite, this gradient is not"
        return "gradient norm", "every gradient is finite, but their norm overflows"

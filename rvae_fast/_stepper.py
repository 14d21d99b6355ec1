"""One optimiser step of a model on a group of batches, its record, and what happens when it goes wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rvae_fast import _rng
from rvae_fast._history import STEP_COLUMNS, History
from rvae_fast._nonfinite import ActivationWatch, BufferGuard, NonFiniteError, find_in_rows, non_finite_weight
from rvae_fast._optimizer import Optimizer
from rvae_fast._precision import autocast
from rvae_fast._rows import Rows
from rvae_fast._schedule import Schedule

Group = list[tuple[int, int]]


class Stepper:
    """Takes optimiser steps and writes them to a history.

    Loss and norm are read from the device every ``sync_every`` steps. Between two readings a non-finite value raises a
    flag on the device that stays up and makes every later update, and every later copy of the buffers, do nothing; so
    when the reading finds it, weights and statistics are those from before the bad step.
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
    ) -> None:
        self.model, self.rows, self.schedule, self.history = model, rows, schedule, history
        self.seed, self.precision, self.sync_every = seed, precision, sync_every
        self.optimizer = Optimizer([p for p in model.parameters() if p.requires_grad], schedule.config)
        self.guard = BufferGuard(model)
        self.order = torch.empty(0, dtype=torch.int64)
        #: True while an update is half made; if a run is broken off there, its state must not be saved.
        self.torn = False
        self._blocked = torch.zeros((), device=rows.device)
        self._pending: list[tuple[int, Group, Tensor]] = []

    def step(self, step: int, group: Group) -> None:
        """Optimiser step ``step`` (from 0) on batches ``group`` of :attr:`order`.

        Raises
        ------
        NonFiniteError
        """
        try:
            record, norm = self._gradient(step, group)
        except BaseException:
            self.guard.restore()
            raise
        learning_rate = self.schedule.learning_rate(step)
        if self.sync_every == 1:
            values = record.tolist()
            if not all(map(math.isfinite, values)):
                self._fail(step, group, values)
            self.torn = True
            self.optimizer.step(learning_rate, norm)
            self.guard.save()
            self.history.append_steps([values])
            self.torn = False
            return
        self.torn = True
        self._blocked = torch.maximum(self._blocked, (~torch.isfinite(record)).any().float())
        self.optimizer.step(learning_rate, norm, self._blocked)
        self.guard.save(self._blocked)
        self._pending.append((step, group, record))
        self.torn = False
        if len(self._pending) >= self.sync_every:
            self.read()

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

    def _gradient(self, step: int, group: Group) -> tuple[Tensor, Tensor]:
        """Gradients of the group's mean loss; the step's record ``[4]`` and the gradient norm."""
        _rng.reseed(self.rows.device, _rng.derive(self.seed, "step", step))
        self.optimizer.zero_grad()
        kld_weight = self.schedule.kld_weight(step)
        n = group[-1][1] - group[0][0]
        total: list[Tensor] = []
        for start, stop in group:
            error, kld = self._terms(self.rows.gather(self.order[start:stop]))
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
        return error, kld

    def _fail(self, step: int, group: Group, values: list[float]) -> None:
        self.guard.restore()
        try:
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
        _rng.reseed(self.rows.device, _rng.derive(self.seed, "step", step))
        self.optimizer.zero_grad()
        kld_weight = self.schedule.kld_weight(step)
        n = group[-1][1] - group[0][0]
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

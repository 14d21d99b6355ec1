"""A training run: its data, its position in them, its state on disk. The public face is :mod:`rvae_fast.training`."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rvae_fast import _checkpoint, _rng
from rvae_fast._checkpoint import CheckpointError
from rvae_fast._graphs import step_graph
from rvae_fast._history import History
from rvae_fast._interrupt import DeferredInterrupt
from rvae_fast._nonfinite import NonFiniteError, find_in_rows, non_finite_weight
from rvae_fast._precision import autocast, resolve_precision
from rvae_fast._progress import Progress
from rvae_fast._rates import resolved
from rvae_fast._rows import Rows, batches, groups
from rvae_fast._schedule import Schedule
from rvae_fast._stepper import Stepper
from rvae_fast._training_config import TrainingConfig

#: Called as ``callback(model, history)`` after every epoch; a true return value stops the run.
Callback = Callable[[nn.Module, History], Any]

#: Fields of the configuration that do not change what a run computes, and so may differ when it is resumed.
_INCIDENTAL = (
    "progress",
    "checkpoint",
    "checkpoint_every",
    "checkpoint_unit",
    "sync_every",
    "device",
    "precision",
    "cuda_graph",
)


class Run:
    """One call of :func:`rvae_fast.training.train`, which has checked ``model``, ``config`` and ``resume``."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        config: TrainingConfig,
        validation: Any,
        device: torch.device,
        resume: bool | str,
        callbacks: Sequence[Callback],
    ) -> None:
        weights = [p for p in model.parameters() if p.requires_grad]
        if not weights:
            raise ValueError("model must have parameters that require a gradient, got none")
        if (name := non_finite_weight(model)) is not None:
            raise ValueError(f"model must have finite weights to start from; {name} has NaN or infinity")
        dtype, width = weights[0].dtype, int(model.in_features)  # type: ignore[arg-type]
        self.config, self.device, self.callbacks = config, device, callbacks  # the configuration is resolved below
        self.precision = resolve_precision(config.precision, device, dtype)
        self.graph = step_graph(config.cuda_graph, device, dtype, config.optimizer)

        where: dict[str, Any] = {"device": device, "dtype": dtype, "max_rows": config.batch_size + 1}
        self.rows = Rows(data, "data", width, **where)
        self.held_out = self.rows if validation is None else Rows(validation, "validation", width, **where)
        saved: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        if resume is True or (resume == "auto" and Path(str(config.checkpoint)).exists()):
            saved = _checkpoint.load(str(config.checkpoint))
        seed = config.seed if config.seed is not None or saved is None else saved[1]["history"]["seed"]
        self.seed: int = _rng.draw_seed() if seed is None else seed
        self.train_index, self.val_index = self._split(validation is not None)
        if config.patience is not None and self.val_index is None:
            raise ValueError("patience needs validation data: give validation, or a validation_fraction above 0")

        self.model = model.to(device)
        self.groups = groups(len(self.train_index), config.batch_size, config.accumulate)
        self.config = config = resolved(config, model, len(self.groups))
        self.schedule = Schedule(config, len(self.groups))
        self.history = History(seed=self.seed, precision=self.precision, device=str(device))
        self.epoch = self.group = 0  # of the next step
        self.spent = 0.0  # seconds that the epoch under way had taken when it was checkpointed
        self.began = time.perf_counter()
        self.best: dict[str, Tensor] | None = None
        self.best_loss, self.stale = math.inf, 0
        sync_every = config.sync_every or (1 if device.type == "cpu" else 50)
        self.stepper = Stepper(
            model, self.rows, self.schedule, self.history,
            seed=self.seed, precision=self.precision, sync_every=sync_every, graph=self.graph,
            graph_sizes=[stop - start for start, stop in self.groups[0]],
        )  # fmt: skip
        self.resumed = saved is not None
        if saved is not None:
            self._restore(*saved)

    def _split(self, separate: bool) -> tuple[Tensor, Tensor | None]:
        """Indices of the rows to train on and of those to validate on (in :attr:`held_out`), if any."""
        n, fraction = self.rows.n_rows, self.config.validation_fraction
        train, held_out = torch.arange(n, device="cpu"), None
        if separate:
            held_out = torch.arange(self.held_out.n_rows, device="cpu")
            if not len(held_out):
                raise ValueError("validation must have at least one row, got none")
        elif fraction > 0:
            size = max(1, round(fraction * n))
            order = _rng.permutation(n, self.seed, "split")
            # Sorted: a memory-mapped table is then read in its own order.
            train, held_out = order[size:].sort().values, order[:size].sort().values
        if len(train) < 2:
            kept = f" of which {len(train)} left to train on" if held_out is not None and not separate else ""
            raise ValueError(f"data must have at least 2 rows to train on (BatchNorm needs two), got {n}{kept}")
        return train, held_out

    def go(self) -> History:
        """Train from the present position to the end."""
        steps = len(self.groups)
        progress = Progress(self.config.progress, self.config.epochs, steps, done=self.epoch * steps + self.group)
        try:
            with DeferredInterrupt() as interrupt:
                if self.config.checkpoint is not None and not self.resumed:
                    self._save()  # from the first moment on there is something to resume from
                while self.epoch < self.config.epochs and not self.history.stopped_early:
                    self._train_epoch(progress, interrupt)
                    self._end_epoch(progress)
                    interrupt.check()
        except (KeyboardInterrupt, NonFiniteError) as error:
            self.history.interrupted = True
            error.history = self.history  # type: ignore[union-attr]
            if isinstance(error, KeyboardInterrupt) and self.config.checkpoint is not None and not self.stepper.torn:
                self._save_if_possible()
            raise
        finally:
            progress.close()
            self.stepper.optimizer.zero_grad()
            self.model.eval()
        if self.best is not None and self.config.restore_best:
            self.model.load_state_dict(self.best)
        return self.history

    def _train_epoch(self, progress: Progress, interrupt: DeferredInterrupt) -> None:
        self.model.train()
        self.began = time.perf_counter()
        self.stepper.order = self._order().to(self.rows.index_device)
        config, steps = self.config, len(self.groups)
        by_steps = config.checkpoint is not None and config.checkpoint_unit == "steps"
        while self.group < steps:
            self.stepper.step(self.epoch * steps + self.group, self.groups[self.group])
            self.group += 1
            progress.advance()
            if by_steps and (self.epoch * steps + self.group) % config.checkpoint_every == 0:
                self._save_if_possible()
            interrupt.check()
        self.stepper.read()

    def _order(self) -> Tensor:
        """This epoch's rows, batch after batch.

        Within a batch they are in the table's order: its sum does not care, and a memory-mapped file is read forwards.
        """
        order = self.train_index[_rng.permutation(len(self.train_index), self.seed, "order", self.epoch)]
        size, spans = self.config.batch_size, batches(len(order), self.config.batch_size)
        whole = (len(spans) - 1) * size
        if whole:  # torch sorts no rows of a billion columns by an index of a billion
            order[:whole] = order[:whole].view(len(spans) - 1, size).sort(dim=1).values.view(-1)
        order[whole:] = order[whole:].sort().values
        return order

    def _end_epoch(self, progress: Progress) -> None:
        steps, config = len(self.groups), self.config
        weights = np.array([group[-1][1] - group[0][0] for group in self.groups], dtype=np.float64)
        means = weights @ self.history.steps[self.epoch * steps :] / weights.sum()
        val_loss = self._validate()
        last = (self.epoch + 1) * steps - 1
        row = {
            "epoch": self.epoch + 1,
            "train_loss": float(means[0]),
            "train_error": float(means[1]),
            "train_kld": float(means[2]),
            "val_loss": val_loss,
            "learning_rate": self.schedule.learning_rate(last),
            "kld_weight": self.schedule.kld_weight(last),
            "seconds": self.spent + time.perf_counter() - self.began,
        }
        self.history.epochs.append(row)
        if val_loss is not None:
            if val_loss < self.best_loss - config.min_delta:
                self.best_loss, self.stale, self.history.best_epoch = val_loss, 0, self.epoch + 1
                self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            else:
                self.stale += 1
                self.history.stopped_early = config.patience is not None and self.stale >= config.patience
        self.epoch, self.group, self.spent = self.epoch + 1, 0, 0.0
        self.began = time.perf_counter()
        for callback in self.callbacks:
            if callback(self.model, self.history):
                self.history.stopped_early = True
        if self.graph is not None and self.callbacks:
            self.graph.invalidate()  # a callback may have changed the model
        final = self.epoch == config.epochs or self.history.stopped_early
        if config.checkpoint is not None:
            due = config.checkpoint_unit == "epochs" and self.epoch % config.checkpoint_every == 0
            if final or due:
                self._save_if_possible()
        progress.epoch(row, last=final)

    @torch.no_grad()
    def _validate(self) -> float | None:
        """Mean loss of the held-out rows in eval mode, at the full KL weight."""
        if self.val_index is None:
            return None
        self.model.eval()
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.zeros((), dtype=wide, device=self.device)
        index = self.val_index.to(self.held_out.index_device)
        size = self.config.batch_size
        for start in range(0, len(index), size):
            with autocast(self.precision, self.device):
                error, kld = self.model.loss_terms(self.held_out.gather(index[start : start + size]))  # type: ignore[operator]
            total += (error + self.config.kld_weight * kld).sum(dtype=wide)
        loss = float(total) / len(index)
        if not math.isfinite(loss):
            raise self._bad_validation(index, loss)
        return loss

    def _bad_validation(self, index: Tensor, loss: float) -> NonFiniteError:
        why = f"it is {loss:g}"
        for part in index.split(self.config.batch_size):
            if (found := find_in_rows(self.held_out.gather(part), part)) is not None:
                why = "row {}, column {} of {name} is {}".format(*found, name=self.held_out.name)
                break
        epoch, step = self.epoch + 1, (self.epoch + 1) * len(self.groups)
        return NonFiniteError(
            f"non-finite value in validation loss at epoch {epoch}, step {step}: {why}. The model keeps its weights.",
            epoch=epoch, step=step, tensor="validation loss",
        )  # fmt: skip

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What two runs must share for one to continue the other to the same bits."""
        held_out = None if self.held_out is self.rows else self.held_out.fingerprint()
        config = {key: value for key, value in self.config.to_dict().items() if key not in _INCIDENTAL}
        return {
            "model": _checkpoint.describe_model(self.model),
            # The optimiser's state goes by position among those that are trained.
            "parameters": {n: "trained" if p.requires_grad else "frozen" for n, p in self.model.named_parameters()},
            "config": config | {"seed": self.seed},  # the one in use: whoever gives none goes on with the checkpoint's
            "data": self.rows.fingerprint(),
            "validation": held_out,
            "precision": self.precision,
            "device": self.device.type,
        }

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        state |= {f"optimizer.{name}": value for name, value in self.stepper.optimizer.tensors().items()}
        return state | {"history.steps": torch.from_numpy(self.history.steps.copy())}

    def _save(self) -> None:
        self.stepper.read()  # raises, and leaves the old file, if a step since the last reading went wrong
        tensors = self._state() | {f"best.{name}": value for name, value in (self.best or {}).items()}
        spent = self.spent + time.perf_counter() - self.began
        header = {
            "identity": self._identity,
            "position": {"epoch": self.epoch, "group": self.group, "spent": spent if self.group else 0.0},
            "best_loss": self.best_loss if self.best is not None else None,
            "stale": self.stale,
            "history": self.history.summary(),
        }
        _checkpoint.save(str(self.config.checkpoint), tensors, header)

    def _save_if_possible(self) -> None:
        """Save; hours of training are worth more than their checkpoint, so a full disk is a warning."""
        try:
            self._save()
        except OSError as error:
            warnings.warn(f"{error}; the training goes on, with the checkpoint of before", RuntimeWarning, stacklevel=2)

    def _restore(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        path = str(self.config.checkpoint)
        try:
            saved = header["identity"]
            saved = {**saved, "config": {**saved["config"], "seed": header["history"]["seed"]}}
            known = {key: value for key, value in self._identity.items() if key != "parameters" or key in saved}
            _checkpoint.require_same(path, saved, known)  # checkpoints of earlier versions do not name the parameters
            own = {name: value for name, value in self._state().items() if name != "history.steps"}  # that grows
            _checkpoint.require_shapes(path, tensors, own)
            position, stale, best_loss = header["position"], header["stale"], header["best_loss"]
            history = History.from_dict({**header["history"], "steps": tensors["history.steps"].numpy()})
            epoch, group, spent = position["epoch"], position["group"], position["spent"]
            best = {name: value.to(self.device) for name, value in _checkpoint.subset(tensors, "best.").items()}
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path!r} is a checkpoint without {error}: it is damaged") from error
        self.model.load_state_dict(_checkpoint.subset(tensors, "model."))
        self.stepper.optimizer.load(_checkpoint.subset(tensors, "optimizer."))
        self.stepper.guard.save()
        history.interrupted = False
        self.history = self.stepper.history = history
        self.epoch, self.group, self.spent, self.stale = epoch, group, spent, stale
        if best:
            self.best, self.best_loss = best, best_loss

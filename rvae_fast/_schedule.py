"""Learning rate and KL weight as pure functions of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rvae_fast._training_config import TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate and KL weight of every optimiser step of a run, whose configuration has no ``"auto"`` left."""

    config: TrainingConfig
    steps_per_epoch: int

    def learning_rate(self, step: int) -> float:
        """Of optimiser step ``step``, counted from 0.

        Linear from ``learning_rate / (warm-up steps + 1)`` over the warm-up, so that no step is wasted at 0; the first
        step after it has the full rate. Then constant, or down towards ``final_learning_rate``, which the step after
        the last would have, by half a cosine (Loshchilov and Hutter 2017, equation 5, without restarts) or a line.
        """
        config, highest = self.config, float(self.config.learning_rate)
        warmup = round(float(config.warmup_epochs) * self.steps_per_epoch)
        if step < warmup:
            return highest * (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return highest
        done = min(1.0, (step - warmup) / max(1, config.epochs * self.steps_per_epoch - warmup))
        share = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return config.final_learning_rate + (highest - config.final_learning_rate) * share

    def kld_weight(self, step: int) -> float:
        """Of optimiser step ``step``, counted from 0: linear up to ``kld_weight`` over the warm-up, then constant."""
        warmup = round(self.config.kld_warmup_epochs * self.steps_per_epoch)
        return self.config.kld_weight * min(1.0, (step + 1) / (warmup + 1))

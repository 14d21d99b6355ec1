"""One training loop for AE, RAE, VAE and RVAE.

Adam with warm-up and a schedule, gradients clipped by their global norm (Pascanu, Mikolov and Bengio 2013), KL weight
with warm-up, gradient accumulation, early stopping, bf16, and a checkpoint that resumes to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rvae_fast import _rng
from rvae_fast._checkpoint import CheckpointError
from rvae_fast._history import History
from rvae_fast._nonfinite import NonFiniteError
from rvae_fast._precision import resolve_device
from rvae_fast._rates import default_learning_rate
from rvae_fast._threads import alone_in_a_child
from rvae_fast._training_config import TrainingConfig, check_resume
from rvae_fast._training_run import Callback, Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CheckpointError", "History", "NonFiniteError", "TrainingConfig", "default_learning_rate", "train"]


def train(
    model: nn.Module,
    data: Tensor | NDArray[Any],
    config: TrainingConfig | None = None,
    *,
    validation: Tensor | NDArray[Any] | None = None,
    resume: bool | str = False,
    callbacks: Sequence[Callback] = (),
) -> History:
    """Train a model in place.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE
        Any ``nn.Module`` with ``in_features`` and ``loss_terms(x) -> (error [batch], kld [batch])``. Moved to
        ``config.device``; left there, in eval mode.
    data : Tensor or ndarray [n_rows, in_features]
        At least two rows of real numbers; a ``numpy.memmap`` is read batch by batch. Integers are converted, not
        scaled.
    config : TrainingConfig, optional
    validation : Tensor or ndarray [n_rows, in_features], optional
        Rows for early stopping and the best epoch, in place of ``config.validation_fraction``.
    resume : bool or "auto", default False
        True continues from ``config.checkpoint`` and fails where there is none; ``"auto"`` begins where there is none.
        On the same machine, with the same number of threads, the result is that of an unbroken run, bit for bit. False
        begins anew and replaces a checkpoint that is there.
    callbacks : sequence of callable
        Each called as ``callback(model, history)`` after every epoch; a true return value stops the run.

    Returns
    -------
    History

    Raises
    ------
    TypeError, ValueError
        For an argument that cannot be used, naming it.
    CheckpointError
        When the checkpoint is damaged, or of another model, configuration or data.
    NonFiniteError
        When loss or gradient is NaN or infinite. The model keeps the weights of the last good step; the checkpoint is
        untouched.
    KeyboardInterrupt
        Ctrl-C takes effect between two steps: the model has the weights of the last whole step, the checkpoint is
        brought up to date. This exception and :class:`NonFiniteError` carry the :class:`History` as ``history``.

    Notes
    -----
    Rows are shuffled anew every epoch; within a batch they are in the order of the table. A single row left over joins
    the batch before it. The validation loss is that of the model in eval mode, at the full KL weight.

    In a child of ``os.fork`` whose parent has trained or scored, where PyTorch's threads would be waited for for ever,
    one thread does it all. A process that was spawned has them.

    Examples
    --------
    >>> import torch
    >>> from rvae_fast import RVAE
    >>> from rvae_fast.training import TrainingConfig, train
    >>> history = train(RVAE(16, latent_features=4, n_layers=4), torch.rand(100, 16), TrainingConfig(epochs=2, seed=0))
    >>> len(history.epochs)
    2
    """
    config = TrainingConfig() if config is None else config
    if not isinstance(config, TrainingConfig):
        raise TypeError(f"config must be a TrainingConfig, got {type(config).__name__}")
    if not isinstance(model, nn.Module) or not callable(getattr(model, "loss_terms", None)):
        raise TypeError(f"model must be an nn.Module with loss_terms(x), such as RVAE, got {type(model).__name__}")
    if not hasattr(model, "in_features"):
        raise TypeError(f"model must have in_features, the width of a row; {type(model).__name__} has none")
    check_resume(resume, config)
    device = resolve_device(config.device, model)
    # Whoever calls from a block without gradients, as an evaluation's, means their own computations.
    with alone_in_a_child(training=True), torch.inference_mode(False), torch.enable_grad():
        run = Run(model, data, config, validation, device, resume, callbacks)
        with _rng.fork(device):
            return run.go()

"""What is kept of a training without a checkpoint that Ctrl-C or a number not finite ended, and of a model without room
on the disk.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rvae_fast.cli.common import note


def name_columns(detectors: Sequence[Any], names: Sequence[str] | None) -> None:
    """Give fitted detectors the names of their columns: without pandas, fit saw none."""
    import numpy as np

    for one in detectors:
        if names is not None and not hasattr(one, "feature_names_in_"):
            one.feature_names_in_ = np.asarray(names, dtype=object)


def keep_what_there_is(detector: Any, X: Any, names: Sequence[str] | None, out: Path, error: BaseException) -> None:
    """Save a detector beside ``out`` whose training was interrupted, if that came to the end of an epoch.

    Parameters
    ----------
    detector : detector
        As the interrupted ``fit`` left it.
    X : array-like [n_rows, n_features]
        What it was fitted to.
    names : sequence of str or None
        Of the columns.
    out : Path
        Where the whole one would have gone: the name becomes ``NAME.interrupted.SUFFIX``, numbered where that is taken.
    error : BaseException
        What ended it: a KeyboardInterrupt, or a NonFiniteError, before which the last good weights were put back.
    """
    if hasattr(detector, "estimators_"):
        note("of several members nothing is kept without --checkpoint")
        return
    done = len(detector.history_.epochs) if hasattr(detector, "history_") else 0
    if not done:
        return
    by_hand = isinstance(error, KeyboardInterrupt)
    what = "interrupted" if by_hand else "a number that is not finite"
    note(f"{what} in epoch {done + 1}; saving what there is (Ctrl-C again: without)")
    try:
        detector.fit_score(X)
    except ValueError as why:
        if by_hand:
            raise
        note(f"nothing is saved: {why}")  # and what ended the training is told after this
        return
    path = _save_beside(detector, names, out)
    note(f"wrote {path}; with --checkpoint a training can be resumed")


def keep_trained(detector: Any, names: Sequence[str] | None, out: Path) -> None:
    """Save a trained detector or ensemble beside ``out`` whose threshold was interrupted, with that of ``fit``."""
    path = _save_beside(detector, names, out)
    note(f"wrote {path}, its threshold by the training rows; rvae-fast calibrate places another")


def save_trained(detector: Any, out: Path) -> None:
    """Save a detector or ensemble; where ``out`` cannot be written any more, in the folder for temporary files.

    Raises
    ------
    OSError
        Where ``out`` could not be written, saying where the model is if it is saved.
    """
    from rvae_fast.serialization import save

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save(detector, out)
    except OSError as error:
        path = _free(Path(tempfile.gettempdir()), out, "kept")
        try:
            save(detector, path)
        except OSError:
            raise error from None
        raise OSError(f"{out} cannot be written: {error.strerror or error}; the trained model is in {path}") from error


def _free(folder: Path, out: Path, word: str) -> Path:
    """The name of ``out`` with a word in it, numbered where it is taken."""
    names = (f"{out.stem}.{word}{number}{out.suffix}" for number in itertools.chain([""], itertools.count(2)))
    return next(path for name in names if not (path := folder / name).exists())


def _save_beside(detector: Any, names: Sequence[str] | None, out: Path) -> Path:
    from rvae_fast.serialization import save

    name_columns((detector, *getattr(detector, "estimators_", ())), names)
    path = _free(out.parent, out, "interrupted")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(detector, path)
    return path

"""What a table must be before a detector looks at it, and what is said when it is not.

scikit-learn's own checks do the common part (shape, sparse, feature names); added here are the messages that name the
columns at fault, and a finiteness check that reads in chunks, so that a memory map is never copied whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A message names at most so many columns.
MAX_NAMED = 10


def check_choice(name: str, value: object, allowed: Sequence[Any]) -> None:
    """Raise a ValueError that names the parameter unless ``value`` is one of ``allowed``."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


@contextlib.contextmanager
def unless_refused(estimator: Any) -> Iterator[None]:
    """Inside, an error leaves the estimator as it was: what is refused does not cost what an earlier fit has made."""
    before = dict(estimator.__dict__)
    try:
        yield
    except BaseException:
        estimator.__dict__.clear()
        estimator.__dict__.update(before)
        raise


def check_random(value: Any) -> np.random.RandomState:
    """Return the generator that ``random_state`` stands for, or raise an error that names it."""
    from sklearn.utils import check_random_state

    try:
        return check_random_state(value)
    except ValueError as error:
        raise ValueError(
            "random_state must be None, a whole number from 0 to 2**32 - 1 or a numpy.random.RandomState, "
            f"got {value!r}"
        ) from error


def check_contamination(value: object) -> float:
    """Return ``contamination`` as a float in (0, 0.5], or raise an error that names it."""
    return check_share_of_rows("contamination", value, "the share of the training rows to be flagged")


def check_share_of_rows(name: str, value: object, what: str) -> float:
    """Return a share as a float in (0, 0.5], or raise an error that names it and says what it is the share of."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number in (0, 0.5], got {value!r}")
    if not 0 < value <= 0.5:
        raise ValueError(f"{name} must be in (0, 0.5], got {value!r}: it is {what}")
    return float(value)


def name_columns(which: NDArray[Any], names: Any = None, notes: Iterable[str] | None = None) -> str:
    """List the columns where ``which`` [n_features] holds, by name if they have one, each with its note if given."""
    index = np.flatnonzero(which)
    labels = [str(j) if names is None else repr(str(names[j])) for j in index[:MAX_NAMED]]
    if notes is not None:
        labels = [f"{label} ({note})" for label, note in zip(labels, notes, strict=False)]
    more = f" and {len(index) - MAX_NAMED} more" if len(index) > MAX_NAMED else ""
    return ("column " if len(index) == 1 else "columns ") + ", ".join(labels) + more


def check_table(estimator: Any, X: Any, *, reset: bool, min_rows: int = 1) -> NDArray[Any]:
    """Check a table's shape, columns and dtype, not its values; return it as a 2-D array, uncopied where possible.

    Parameters
    ----------
    estimator : scikit-learn estimator
        With ``reset`` its ``n_features_in_`` and ``feature_names_in_`` are set; else ``X`` must agree with them.
    X : array-like, DataFrame or Tensor [n, n_features]
    reset : bool
    min_rows : int

    Raises
    ------
    TypeError
        For sparse input and for cells that are no numbers, naming the columns.
    ValueError
        For a wrong number of dimensions, rows or columns, wrong column names, and text, naming the columns.
    """
    from sklearn.utils.validation import validate_data

    if hasattr(X, "detach") and hasattr(X, "cpu"):
        X = X.detach().cpu()
        X = (X.float() if str(X.dtype) == "torch.bfloat16" else X).numpy()
    if isinstance(X, np.ma.MaskedArray) and X.dtype.kind in "fiub":
        # NumPy forgets the mask; what is under it (-9999, 1e20) is no value.
        dtype = X.dtype if X.dtype.kind == "f" else np.float64
        X = np.ma.filled(X.astype(dtype), np.nan) if X.mask.any() else X.data
    _check_labels(X)
    _check_numeric(X)
    table: NDArray[Any] = validate_data(
        estimator, X, reset=reset, dtype="numeric", ensure_all_finite=False, ensure_min_samples=min_rows
    )
    return table


def check_finite(parts: Iterable[NDArray[Any]], names: Any = None, allow_nan: bool = False) -> None:
    """Raise a ValueError that counts NaN and infinite values by column, over all chunks, if there are any.

    With ``allow_nan`` NaN is a missing value that will be filled, and only infinities are errors.
    """
    counts: NDArray[np.int64] | None = None
    for part in parts:
        if part.dtype.kind != "f" or _finite(part):
            continue
        found = np.stack([np.isnan(part).sum(axis=0), np.isinf(part).sum(axis=0)])
        counts = found if counts is None else counts + found
    if counts is None:
        return
    nan, inf = counts
    bad = (inf > 0) | ((nan > 0) & (not allow_nan))
    if not bad.any():
        return
    notes = (
        ", ".join(f"{n} {kind}" for n, kind in ((nan[j], "NaN"), (inf[j], "inf")) if n) for j in np.flatnonzero(bad)
    )
    total = ("" if allow_nan else f"{nan.sum()} NaN and ") + f"{inf.sum()} infinite values"
    hint = (
        "" if allow_nan or not nan.any() else "; missing='mean' or missing='median' fills NaN from the training table"
    )
    raise ValueError(f"Input X contains {total} (no NaN or inf is allowed) in {name_columns(bad, names, notes)}{hint}")


def check_unit_range(parts: Iterable[NDArray[Any]], names: Any = None) -> None:
    """Raise a ValueError that names the columns with a value outside [0, 1] in the first chunk that has one."""
    for part in parts:
        with np.errstate(invalid="ignore"):
            outside = np.asarray(((part < 0) | (part > 1)).any(axis=0))
        if outside.any():
            raise ValueError(
                "likelihood='bernoulli' with scaler=None needs values in [0, 1]; outside are "
                f"{name_columns(outside, names)}"
            )


def _finite(part: NDArray[Any]) -> bool:
    # A sum is finite only if every value is, and takes no temporary; it can also overflow, hence the second look.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(part.sum(dtype=np.float64))) or bool(np.isfinite(part).all())


def _check_labels(X: Any) -> None:
    """One dimension is a column of labels or a single row: say both, as neither is a table."""
    shape = getattr(X, "shape", None)
    if shape is None and isinstance(X, (list, tuple)) and X and np.isscalar(X[0]):
        shape = (len(X),)
    if shape is not None and len(shape) == 1:
        raise ValueError(
            f"Expected 2D array, got 1D array instead: X must be the table of features [n_rows, n_features], got "
            f"{shape[0]} values. Labels are not features (a detector learns without them). Reshape your data with "
            "X.reshape(-1, 1) if it is one feature, or X.reshape(1, -1) if it is one row."
        )


def _check_numeric(X: Any) -> None:
    """Name the columns that hold something other than numbers; scikit-learn's message names none."""
    if hasattr(X, "dtypes") and hasattr(X, "columns") and hasattr(X, "iloc"):
        columns = [(name, X.iloc[:, j]) for j, name in enumerate(X.columns)]
    elif isinstance(X, np.ndarray) and X.ndim == 2 and X.dtype.kind in "OUSMm":
        columns = [(j, X[:, j]) for j in range(X.shape[1])]
    else:
        return
    bad: list[str] = []
    error: type[Exception] = ValueError
    reason = ""
    for name, column in columns:
        kind = getattr(column.dtype, "kind", "O")
        if kind in "biufc":  # complex is refused by scikit-learn, in its words
            continue
        if kind in "mM":
            bad.append(f"{name!r} (dtype {column.dtype})")
            continue
        try:
            if column.dtype.name == "category":
                column = column.astype(object)
            np.asarray(
                column.to_numpy(dtype=np.float64, na_value=np.nan) if hasattr(column, "to_numpy") else column,
                dtype=float,
            )
        except (TypeError, ValueError) as caught:
            if any(np.iscomplexobj(v) for v in np.asarray(column, dtype=object)[:100]):
                continue
            bad.append(f"{name!r} (dtype {column.dtype})")
            # A cell that is no text at all is a TypeError in scikit-learn's convention, text a ValueError.
            error, reason = (
                (TypeError, str(caught)) if isinstance(caught, TypeError) else (error, reason or str(caught))
            )
    if bad:
        shown = ", ".join(bad[:MAX_NAMED]) + (f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else "")
        raise error(
            f"X has {len(bad)} non-numeric column{'s' * (len(bad) > 1)}: {shown}"
            + (f": {reason}" if reason else "")
            + ". Encode or drop them first (sklearn.preprocessing.OrdinalEncoder, OneHotEncoder)."
        )

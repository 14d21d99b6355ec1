"""Splits for novelty and anomaly detection: RaPP's novelty split of labelled classes, and the split of an anomaly
table.

Both return the row indices beside the arrays, so that a run can be recorded and repeated on the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RAPP_FRACTIONS = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class NoveltySplit:
    """Train and validation rows, and a test set with anomalies in it.

    Attributes
    ----------
    X_train, X_validation, X_test : ndarray, shape [n, n_features]
        Rows of the input, its dtype kept. Train and validation are normal, unless the split says otherwise.
    y_test : ndarray of int64, shape [n_test]
        1 for a novel row (an anomaly), 0 for a normal one.
    train_indices, validation_indices, test_indices : ndarray of int64
        Row numbers in the input; disjoint.
    y_train : ndarray of int64, shape [n_train]
        All zero, unless anomalies were left in the training rows (`anomaly_split` with contamination).
    """

    X_train: np.ndarray
    X_validation: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    train_indices: np.ndarray
    validation_indices: np.ndarray
    test_indices: np.ndarray
    y_train: np.ndarray

    @property
    def novel_fraction(self) -> float:
        """Share of the test rows that are novel."""
        return float(self.y_test.mean()) if self.y_test.size else 0.0


def novelty_split(
    X: np.ndarray,
    y: np.ndarray,
    novel_class: Any | Sequence[Any] = None,
    *,
    seed: int | np.random.Generator,
    fractions: Sequence[float] = RAPP_FRACTIONS,
    normal_class: Any | Sequence[Any] = None,
    novel_share: float | None = None,
) -> NoveltySplit:
    """Split labelled rows as RaPP does (Kim et al., ICLR 2020): some classes are novel, and only the test set holds
    them.

    All rows are pooled. The normal ones are shuffled and cut by `fractions` into train, validation and test; the test
    set is the normal part plus the novel rows.

    * *Multimodal* (RaPP's main setting): `novel_class=0` makes one class novel and all others normal. MNIST with
      digit 0 gives 12,620 normal and 6,903 novel test rows, 35.4 %.
    * *Unimodal*: `normal_class=0` makes one class normal and all others novel. The test set is then half novel, as in
      RaPP, the novel rows being drawn at random from all the other classes.

    Parameters
    ----------
    X : ndarray, shape [n_rows, n_features]
    y : array-like, shape [n_rows]
        Class labels.
    novel_class : label or sequence of labels
        The novel class or classes.
    seed : int or numpy.random.Generator
        The same integer gives the same rows on every machine.
    fractions : three floats
        Shares of the normal rows for train, validation and test; they sum to 1.
    normal_class : label or sequence of labels
        Instead of `novel_class`: the normal classes, every other one being novel. With both given, classes in neither
        are left out.
    novel_share : float in (0, 1), optional
        Share of novel rows wanted in the test set; novel rows are dropped at random to reach it. Default: every novel
        row, or one half when only `normal_class` is given.

    Returns
    -------
    NoveltySplit

    Raises
    ------
    ValueError
        Shapes that disagree, a class that does not occur, no class left on one side, fractions that are not shares,
        or a `novel_share` that the novel rows cannot reach.
    """
    X, labels = _check_rows(X, y)
    shares = _check_fractions(fractions)
    rng = _generator(seed)
    if novel_class is None and normal_class is None:
        raise ValueError("novel_class: give the novel class (or normal_class, for one normal class against the rest)")
    novel = None if novel_class is None else _mask(labels, novel_class, "novel_class")
    normal = None if normal_class is None else _mask(labels, normal_class, "normal_class")
    if novel is None:
        assert normal is not None
        novel = ~normal
        novel_share = 0.5 if novel_share is None else novel_share
    elif normal is None:
        normal = ~novel
    if np.any(novel & normal):
        raise ValueError(f"novel_class {novel_class!r} and normal_class {normal_class!r} overlap")
    if not normal.any() or not novel.any():
        raise ValueError(f"no {'normal' if not normal.any() else 'novel'} rows are left: y has only {_classes(labels)}")

    train, validation, test_normal = _cut(rng.permutation(np.flatnonzero(normal)), shares)
    test_novel = np.flatnonzero(novel)
    if novel_share is not None:
        test_novel = _draw_share(test_novel, len(test_normal), novel_share, rng)
    return _assemble(X, novel, train, validation, np.concatenate([test_normal, test_novel]))


def anomaly_split(
    X: np.ndarray,
    y: np.ndarray,
    *,
    seed: int | np.random.Generator,
    fractions: Sequence[float] = RAPP_FRACTIONS,
    contamination: float = 0.0,
) -> NoveltySplit:
    """Split an anomaly table (y: 1 = anomaly) into train, validation and test.

    Parameters
    ----------
    X : ndarray, shape [n_rows, n_features]
    y : array-like of 0 and 1, shape [n_rows]
    seed : int or numpy.random.Generator
    fractions : three floats
        Shares of the normal rows for train, validation and test.
    contamination : float in [0, 0.5), default 0
        Share of anomalies in the train set and in the validation set. 0 trains on normal rows only, every anomaly
        being tested. Above 0, anomalies drawn at random are mixed, unmarked, into both, as happens to whoever trains
        on raw data, and only the rest is tested.

    Returns
    -------
    NoveltySplit
        `y_train` says which training rows are anomalies, for the record: a detector must not see it.

    Raises
    ------
    ValueError
        As `novelty_split`; labels other than 0 and 1; or a contamination that needs more anomalies than there are
        while leaving one to test.
    """
    X, labels = _check_rows(X, y)
    shares = _check_fractions(fractions)
    rng = _generator(seed)
    unknown = np.setdiff1d(labels, [0, 1])
    if unknown.size:
        raise ValueError(f"y: expected 0 (normal) and 1 (anomaly), found also {_classes(unknown)}")
    if not 0.0 <= contamination < 0.5:
        raise ValueError(f"contamination: expected a share in [0, 0.5), got {contamination!r}")
    anomalous = labels == 1
    if not anomalous.any() or anomalous.all():
        raise ValueError(
            f"y: expected normal rows and anomalies, found {int(anomalous.sum())} anomalies in {len(labels)} rows"
        )
    train, validation, test = _cut(rng.permutation(np.flatnonzero(~anomalous)), shares)
    anomalies = rng.permutation(np.flatnonzero(anomalous))
    # contamination c of a set with n normal rows: a / (n + a) = c
    wanted = [round(len(part) * contamination / (1.0 - contamination)) for part in (train, validation)]
    if sum(wanted) >= len(anomalies):
        raise ValueError(
            f"contamination: {contamination} puts {sum(wanted)} anomalies into train and validation, but there are "
            f"{len(anomalies)} and at least one must be left to test"
        )
    first, second = wanted[0], wanted[0] + wanted[1]
    train = rng.permutation(np.concatenate([train, anomalies[:first]]))
    validation = rng.permutation(np.concatenate([validation, anomalies[first:second]]))
    return _assemble(X, anomalous, train, validation, np.concatenate([test, np.sort(anomalies[second:])]))


def _assemble(
    X: np.ndarray, anomalous: np.ndarray, train: np.ndarray, valid: np.ndarray, test: np.ndarray
) -> NoveltySplit:
    marks = anomalous.astype(np.int64)
    return NoveltySplit(
        X_train=X[train],
        X_validation=X[valid],
        X_test=X[test],
        y_test=marks[test],
        train_indices=train,
        validation_indices=valid,
        test_indices=test,
        y_train=marks[train],
    )


def _check_rows(X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    X, labels = np.asanyarray(X), np.asarray(y)
    if X.ndim < 2:
        raise ValueError(f"X: expected rows of features, shape [n_rows, n_features], got shape {X.shape}")
    if labels.shape != (len(X),):
        raise ValueError(f"y: expected one label a row, shape ({len(X)},), got shape {labels.shape}")
    return X, labels


def _check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    shares = tuple(float(share) for share in fractions)
    if len(shares) != 3 or any(not share >= 0 for share in shares) or abs(sum(shares) - 1.0) > 1e-6:
        raise ValueError(
            f"fractions: expected three shares that sum to 1 (train, validation, test), got {tuple(fractions)!r}"
        )
    return shares  # type: ignore[return-value]


def _generator(seed: int | np.random.Generator) -> np.random.Generator:
    if seed is None:
        raise ValueError("seed: expected an integer or a numpy Generator; without one the split could not be repeated")
    try:
        return np.random.default_rng(seed)
    except (TypeError, ValueError) as error:
        raise type(error)(f"seed: expected an integer of at least 0 or a numpy Generator, got {seed!r}") from error


def _cut(rows: np.ndarray, shares: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut shuffled rows; the test part takes what rounding leaves, so that every row is used once."""
    n_train = round(len(rows) * shares[0])
    n_validation = min(round(len(rows) * shares[1]), len(rows) - n_train)
    if n_train == 0 or (shares[2] > 0 and n_train + n_validation == len(rows)):
        raise ValueError(f"fractions: {shares} of {len(rows)} normal rows leave the train or the test set without one")
    return rows[:n_train], rows[n_train : n_train + n_validation], rows[n_train + n_validation :]


def _draw_share(novel: np.ndarray, n_normal: int, share: float, rng: np.random.Generator) -> np.ndarray:
    if not 0.0 < share < 1.0:
        raise ValueError(f"novel_share: expected a share in (0, 1), got {share!r}")
    wanted = round(n_normal * share / (1.0 - share))
    if not 1 <= wanted <= len(novel):
        raise ValueError(
            f"novel_share: {share} of a test set with {n_normal} normal rows takes {wanted} novel rows, "
            f"there are {len(novel)}"
        )
    return np.sort(rng.choice(novel, size=wanted, replace=False))


def _mask(labels: np.ndarray, wanted: Any, argument: str) -> np.ndarray:
    values = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, (str, bytes)) else [wanted]
    if not values:
        raise ValueError(f"{argument}: expected a class or several, got an empty sequence")
    for value in values:
        if not np.any(labels == value):
            raise ValueError(f"{argument}: no row has class {value!r}; y has {_classes(labels)}")
    return np.isin(labels, values)


def _classes(labels: np.ndarray) -> str:
    unique = np.unique(labels).tolist()
    shown = ", ".join(repr(value) for value in unique[:20])
    return shown + (f", ... ({len(unique)} classes)" if len(unique) > 20 else "")

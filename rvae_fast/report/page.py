"""Assemble the report: figures, tables and pictures into one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rvae_fast.datasets.cache import atomic_path
from rvae_fast.report.fitted import curves, history_of, parameters
from rvae_fast.report.gallery import build_gallery
from rvae_fast.report.metrics import check_labels, check_scores, evaluate_scores
from rvae_fast.report.rows import extreme_positions
from rvae_fast.report.summary import cards, lead, worst_mistakes
from rvae_fast.report.theme import number

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from rvae_fast.report.metrics import Evaluation
    from rvae_fast.report.theme import Picture

__all__ = ["environment", "is_report", "output_files", "versions", "write_report"]

_LISTED = 20
_GENERATOR = b'<meta name="generator" content="rvae-fast">'
_NAMES = (
    *("score-histogram", "roc", "precision-recall", "loss", "gradient-norm"),
    *("reconstructions-worst", "reconstructions-best"),
)


def require_packages() -> None:
    """Raise ImportError, saying what to install, unless a page can be drawn here: to be called before long work."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"a report needs the 'report' extra ({error}): pip install 'rvae-fast[report]'") from error


def output_files(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Path]]:
    """Return the HTML file that ``path`` stands for, and where each picture may be written beside it."""
    target = Path(path)
    if target.suffix.lower() in {".html", ".htm"}:
        return target, {name: target.with_name(f"{target.stem}-{name}.png") for name in _NAMES}
    return target / "index.html", {name: target / f"{name}.png" for name in _NAMES}


def is_report(path: Path) -> bool:
    """Return whether ``path`` is an HTML file that :func:`write_report` wrote."""
    return path.is_file() and _GENERATOR in path.read_bytes()[:4096]


def versions() -> dict[str, str]:
    """Return the versions that a reader needs to repeat the run."""
    import importlib.metadata
    import platform

    found = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in ("rvae-fast", "torch", "numpy", "scikit-learn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _pictures(
    scores: NDArray[np.float64],
    threshold: float,
    labels: NDArray[np.bool_] | None,
    evaluation: Evaluation | None,
    history: Any,
    max_grad_norm: float | None,
    above: int,
    whose: str,
) -> tuple[list[Picture], list[Picture]]:
    from rvae_fast.report.plots import plot_histogram, plot_precision_recall, plot_roc
    from rvae_fast.report.training_plots import plot_gradient_norm, plot_loss

    about_scores = [plot_histogram(scores, threshold, labels, above=above)]
    if evaluation is not None and evaluation.roc is not None:
        about_scores += [plot_roc(evaluation), plot_precision_recall(evaluation)]
    epochs, norms, best = curves(history)
    drawn = [plot_loss(epochs, best) if epochs else None, plot_gradient_norm(norms, max_grad_norm)]
    return about_scores, [dataclasses.replace(p, caption=p.caption + whose) for p in drawn if p is not None]


def _as_fitted(X: Any, detector: Any) -> NDArray[Any]:
    """The values of a DataFrame in the order of the columns that the detector was fitted to."""
    names = getattr(detector, "feature_names_in_", None)
    if names is None or list(X.columns) == list(names):
        return np.asarray(X)
    if set(X.columns) != set(names):
        odd = sorted(map(str, set(X.columns) ^ set(names)))
        raise ValueError(f"X must have the columns that the detector was fitted to; not in both are {', '.join(odd)}")
    return np.asarray(X[list(names)])


def _write(path: Path, data: bytes) -> None:
    """Write a file in one step: a reader sees the old one or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def environment() -> Any:
    """Return the jinja2 environment of the page templates."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rvae_fast.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(data_uri=_data_uri, number=number)
    return environment


def write_report(
    path: str | os.PathLike[str],
    *,
    scores: ArrayLike,
    threshold: float,
    labels: ArrayLike | None = None,
    history: Any = None,
    detector: Any = None,
    X: Any = None,
    reconstruction: Any = None,
    rows: ArrayLike | None = None,
    image_shape: Sequence[int] | None = None,
    feature_names: Sequence[str] | None = None,
    feature_scale: ArrayLike | None = None,
    ids: Sequence[Any] | None = None,
    title: str = "Anomaly report",
    description: str | None = None,
    configuration: Mapping[str, Any] | None = None,
    facts: Mapping[str, str | float | int] | None = None,
    max_grad_norm: float | None = None,
) -> Path:
    """Write a self-contained HTML page about scored rows, and its pictures as PNG files beside it.

    Parameters
    ----------
    path : path-like
        An ``.html`` file, or a directory that gets ``index.html``. Missing directories are made. Existing files of the
        same names are replaced, each in one step; pictures of an earlier report that this one lacks are removed.
    scores : array-like of shape (n,)
        Anomaly scores, higher meaning more anomalous (``-score_samples(X)``); infinity for a row that overflows. Ten
        million are fine: figures are exact, curves are thinned for drawing.
    threshold : float
        Rows scoring above it are flagged.
    labels : array-like of shape (n,), optional
        1 for an anomaly, 0 for a normal row. Adds the ROC and precision-recall curves and the confusion matrix.
    history : History or dict, optional
        Of the training run, as :func:`rvae_fast.train` returns it. Adds the loss and gradient-norm curves.
    detector : detector, optional
        The fitted detector: reconstructs the shown rows if ``reconstruction`` is not given, and lends ``history_``,
        feature names, the scaler's units and its parameters where these are not given.
    X : array-like of shape (n, features), optional
        The rows, in input units; may be a memory map. Only the rows shown are read.
    reconstruction : array-like of the shape of ``X``, optional
        What the model made of them, in input units.
    rows : array-like of int, optional
        Where ``X`` and ``reconstruction`` hold only some rows (see :class:`ExtremeRows`): their positions.
    image_shape : tuple of int, optional
        (height, width) or (height, width, 1 or 3). Shows rows as images, not as feature tables.
    feature_names : sequence of str, optional
        Names of the features.
    feature_scale : array-like of shape (features,), optional
        Size of one model unit in input units, by which features are ranked.
    ids : sequence, optional
        Names of the rows, of all or of those in ``rows``; their position, counted from 0, where not given.
    title, description : str
        Heading of the page and a sentence under it.
    configuration : mapping, optional
        Shown as a table; the detector's parameters where not given.
    facts : mapping, optional
        Further figures for the head of the page, such as ``{"Scoring": "120,000 rows/s"}``.
    max_grad_norm : float, optional
        The clipping threshold, drawn with the gradient norms; the detector's own where not given.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    ValueError
        If the arrays disagree in length, scores hold NaN, or the threshold is not finite.
    ImportError
        If matplotlib or jinja2 is missing.
    """
    scores = check_scores(scores)
    if not np.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, got {threshold}")
    truth = None if labels is None else check_labels(labels, scores.size)
    require_packages()
    at_hand = np.arange(scores.size) if rows is None else np.asarray(rows, dtype=np.int64)
    if at_hand.ndim != 1 or (at_hand.size and (at_hand.min() < 0 or at_hand.max() >= scores.size)):
        raise ValueError(f"rows must be a vector of positions in 0..{scores.size - 1}")
    for name, value in (("X", X), ("reconstruction", reconstruction)):
        if value is not None and len(value) != at_hand.size:
            raise ValueError(f"{name} has {len(value):,} rows, expected {at_hand.size:,}")
    if ids is not None and len(ids) not in (at_hand.size, scores.size):
        raise ValueError(f"ids has {len(ids):,} entries, expected {scores.size:,}, one a score")

    # Only the ids that appear are turned into text.
    some = ids is not None and len(ids) != scores.size
    position_of = {int(row): i for i, row in enumerate(at_hand)} if some else None

    def row_id(row: int) -> str:
        i = row if position_of is None else position_of.get(row)
        return f"row {row}" if ids is None or i is None else str(ids[i])

    known = parameters(detector)
    configuration = known if configuration is None else dict(configuration)
    history, whose = history_of(detector) if history is None else (history, "")
    max_grad_norm = known.get("max_grad_norm") if max_grad_norm is None else max_grad_norm

    gallery = None
    if X is not None and (reconstruction is not None or detector is not None) and at_hand.size:
        X = _as_fitted(X, detector) if hasattr(X, "iloc") else X if hasattr(X, "shape") else np.asarray(X)
        if feature_names is None:
            feature_names = getattr(detector, "feature_names_in_", None)
        names = (
            [f"feature {i}" for i in range(X.shape[1])] if feature_names is None else [str(v) for v in feature_names]
        )
        if len(names) != X.shape[1]:
            raise ValueError(f"feature_names has {len(names)} names, X has {X.shape[1]} features")

        gallery = build_gallery(
            scores=scores,
            threshold=threshold,
            labels=truth,
            X=X,
            reconstruction=reconstruction,
            rows=at_hand,
            names=names,
            row_id=row_id,
            image_shape=image_shape,
            detector=detector,
            feature_scale=feature_scale,
        )

    above = int((scores > threshold).sum())
    evaluation = None if truth is None else evaluate_scores(scores, truth, threshold)
    about_scores, about_training = _pictures(scores, threshold, truth, evaluation, history, max_grad_norm, above, whose)
    top = [
        (
            rank,
            row_id(int(row)),
            number(scores[row]),
            bool(scores[row] > threshold),
            None if truth is None else bool(truth[row]),
        )
        for rank, row in enumerate(extreme_positions(scores, _LISTED)[0], start=1)
    ]
    mistakes = []
    if truth is not None and evaluation is not None:
        mistakes = [
            (row_id(row), number(scores[row]), bool(truth[row])) for row in worst_mistakes(scores, threshold, truth)
        ]
    html = (
        environment()
        .get_template("report.html")
        .render(
            title=title,
            description=description,
            written=datetime.datetime.now().astimezone(),
            lead=lead(scores, above, threshold, evaluation),
            cards=cards(scores, above, evaluation, facts),
            evaluation=evaluation,
            scores_pictures=about_scores,
            training_pictures=about_training,
            gallery=gallery,
            top=top,
            mistakes=mistakes,
            configuration={str(k): v for k, v in configuration.items()},
            versions=versions(),
        )
    )

    target, places = output_files(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A picture that an earlier report left would pass for one of this report; anybody else's file stays.
    replaced = is_report(target)
    files = {picture.name: picture.light for picture in about_scores + about_training} | (
        gallery.sheets if gallery else {}
    )
    for name, place in places.items():
        if name in files:
            _write(place, files[name])
        elif replaced:
            place.unlink(missing_ok=True)
    _write(target, html.encode("utf-8"))
    return target

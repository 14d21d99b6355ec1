"""One self-contained HTML page about a set of scored rows, with its pictures.

:func:`write_report` draws the page, :func:`evaluate_scores` computes the exact figures on it. Both take arrays, so they
serve any detector. Drawing needs the ``report`` extra (matplotlib and jinja2), which is imported only when a page is
written.
"""

from __future__ import annotations

from rvae_fast.report.metrics import Evaluation, evaluate_scores
from rvae_fast.report.page import write_report
from rvae_fast.report.rows import ExtremeRows

__all__ = ["Evaluation", "ExtremeRows", "evaluate_scores", "write_report"]

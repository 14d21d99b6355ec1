"""The page of an experiment: claims, pictures, tables and what was run, in one HTML file that needs nothing else."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rvae_fast.datasets.cache import atomic_path
from rvae_fast.experiments.claims import Claim
from rvae_fast.report.page import environment, versions
from rvae_fast.report.theme import Picture


@dataclass
class Findings:
    """What an experiment makes of its rows."""

    claims: list[Claim] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    #: Heading and lines of each table.
    tables: dict[str, list[dict[str, str]]] = field(default_factory=dict)


def write_page(
    folder: Path,
    *,
    title: str,
    description: str,
    findings: Findings,
    configuration: Mapping[str, object],
    notes: Sequence[str] = (),
) -> Path:
    """Write ``index.html`` and the pictures as PNG files beside it, each file in one step.

    Parameters
    ----------
    folder : path
    title, description : str
    findings : Findings
    configuration : mapping
        The command and the settings of the run.
    notes : sequence of str
        What a reader must know before believing a number: quick runs, replaced data, missing cells.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for picture in findings.pictures:
        with atomic_path(folder / f"{picture.name}.png") as temporary:
            temporary.write_bytes(picture.light)
    html = (
        environment()
        .get_template("experiment.html")
        .render(
            title=title,
            description=description,
            notes=list(notes),
            findings=findings,
            configuration={str(k): str(v) for k, v in configuration.items()},
            versions=versions(),
            written=datetime.datetime.now().astimezone(),
        )
    )
    page = folder / "index.html"
    with atomic_path(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page

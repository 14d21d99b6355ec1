"""A parser for the pages, and a report with everything in it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the report extra is not installed")
pytest.importorskip("jinja2", reason="the report extra is not installed")

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


@dataclass
class Page(HTMLParser):
    """An HTML page taken apart; raises AssertionError where a tag is closed that is not open."""

    path: Path
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.source = self.path.read_text(encoding="utf-8")
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " " if tag in {"td", "th", "span", "dd"} else ""
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes <{self._open[-1]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in {"style", "script"}:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self) -> list[Any]:
        """Decode every embedded picture."""
        from PIL import Image

        uris = [a["src"] for a in self.all("img")] + [a["srcset"] for a in self.all("source")]
        pictures = []
        for uri in uris:
            kind, _, data = str(uri).partition(",")
            assert kind == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
                picture.load()
                pictures.append(picture)
        return pictures


@pytest.fixture
def read_page() -> type[Page]:
    return Page


def history(epochs: int = 12, steps: int = 60) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    rows = [
        {
            "epoch": i + 1,
            "train_loss": 50 * np.exp(-i / 3) + 5,
            "train_error": 45 * np.exp(-i / 3) + 4,
            "train_kld": 1 + i / epochs,
            "val_loss": 55 * np.exp(-i / 3) + 6,
        }
        for i in range(epochs)
    ]
    return {"epochs": rows, "grad_norm": rng.lognormal(size=steps), "best_epoch": epochs - 1}


@pytest.fixture(scope="session")
def full_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report with all its sections; not to be changed."""
    from rvae_fast.report import write_report

    return write_report(tmp_path_factory.mktemp("full") / "report", **make_everything())


@pytest.fixture
def everything() -> dict[str, Any]:
    """Arguments of a report with all its sections."""
    return make_everything()


def make_everything() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    n, features = 400, 6
    labels = np.zeros(n, dtype=int)
    labels[:60] = 1
    scores = rng.lognormal(size=n) + 4 * labels
    X = rng.normal(size=(n, features))
    return {
        "scores": scores,
        "threshold": 4.5,
        "labels": labels,
        "history": history(),
        "X": X,
        "reconstruction": X + rng.normal(size=X.shape) * np.sqrt(scores)[:, None],
        "feature_names": [f"sensor_{i}" for i in range(features)],
        "ids": [f"unit-{i:04d}" for i in range(n)],
        "title": "Pumps",
        "configuration": {"n_layers": 10, "widths": None},
        "facts": {"Scoring": "120,000 rows/s", "Training": "41 s"},
        "max_grad_norm": 5.0,
    }

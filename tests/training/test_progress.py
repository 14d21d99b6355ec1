from __future__ import annotations

import io
import re
from typing import Any

import pytest

from rvae_fast import _progress
from rvae_fast._progress import Progress, watched
from rvae_fast.training import TrainingConfig, train

OPTIONS: dict[str, Any] = {"epochs": 4, "batch_size": 8, "seed": 0, "validation_fraction": 0.2}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_silent_by_default(model, table, capfd) -> None:
    train(model(), table(40), TrainingConfig(**OPTIONS))
    assert capfd.readouterr() == ("", "")


def test_lines_where_there_is_no_terminal(model, table, capsys) -> None:
    history = train(model(), table(40), TrainingConfig(progress=True, **OPTIONS))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2, "the first epoch and the last; four at most a minute between"
    assert re.fullmatch(r"epoch 1/4  loss \S+  val \S+  \S+ s", lines[0])
    last = history.epochs[-1]
    assert lines[1].startswith(f"epoch 4/4  loss {last['train_loss']:.5g}  val {last['val_loss']:.5g}")


def test_every_epoch_when_epochs_are_slow(model, table, capsys, monkeypatch: Any) -> None:
    monkeypatch.setattr(_progress, "LINE_INTERVAL", 0.0)
    train(model(), table(40), TrainingConfig(progress=True, **OPTIONS))
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]


def test_bar_in_a_terminal(model, table, monkeypatch: Any) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    train(model(), table(40), TrainingConfig(progress=True, **OPTIONS))
    shown = stream.getvalue()
    assert "epoch 4/4  loss" in shown
    assert "16/16" in shown, "32 rows left, 4 steps an epoch, all done"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_bar_is_closed_on_errors(model, table, monkeypatch: Any, error: type[BaseException]) -> None:
    closed = []
    monkeypatch.setattr(Progress, "close", lambda self: closed.append(True))

    def fail(*_: object) -> None:
        raise error

    with pytest.raises(error):
        train(model(), table(40), TrainingConfig(progress=True, **OPTIONS), callbacks=[fail])
    assert closed


class Clock:
    """Seconds that pass only when they are told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_watched_parts(capsys, monkeypatch: Any) -> None:
    clock = Clock()
    monkeypatch.setattr(_progress, "time", clock)
    found = []
    for part in watched(range(6), 6, "scoring rows", True):
        found.append(part)
        clock.now += 2.0
    assert found == list(range(6))
    assert capsys.readouterr().err == "scoring rows  3/6 parts\n", "one line in five seconds"
    assert list(watched(iter("ab"), 2, "scoring rows", True)) == ["a", "b"]
    for _ in watched(range(6), 6, "scoring rows", False):
        clock.now += 9.0
    assert capsys.readouterr().err == ""


def test_watched_parts_in_a_terminal(monkeypatch: Any) -> None:
    clock, stream = Clock(), Terminal()
    monkeypatch.setattr(_progress, "time", clock)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    for _ in watched(range(6), 6, "scoring rows", True):
        pass
    assert stream.getvalue() == "", "it took less than a second"
    for _ in watched(range(6), 6, "scoring rows", True):
        clock.now += 2.0
    assert "6/6" in stream.getvalue()

"""Measured tiles with a timer made up for the test: what is tried, kept, looked up and ignored."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stack_errors import make, step

from rvae_fast.kernels import configurations, residual_stack, residual_stack_backward, tile_table, tuning
from rvae_fast.kernels.configurations import TileConfig
from rvae_fast.kernels.tape import Tape
from rvae_fast.kernels.tile_table import Chip

CHIP = Chip("Test GPU", 90, 227 * 1024, 132)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(tile_table.FOLDER_VARIABLE, str(tmp_path))
    tile_table.forget()
    yield tmp_path
    tile_table.forget()


def timer_for(best: int, tried: list[int] | None = None) -> Callable[[Callable[[], Any]], float]:
    """Runs what it times, and finds the option of that number the quickest."""
    count = iter(range(1000))

    def time(function: Callable[[], Any]) -> float:
        number = next(count)
        if tried is not None:
            tried.append(number)
        function()
        return 1.0 if number == best else 2.0

    return time


@pytest.mark.parametrize("kernel", configurations.KERNELS)
def test_tuning_runs_every_candidate_and_keeps_the_quickest(kernel: str, folder: Path) -> None:
    tried: list[int] = []
    sizes = (40, 64, 60)
    best = tuning.tune(kernel, "ieee", CPU, *sizes, timer=timer_for(1, tried), chip=CHIP)
    among = configurations.candidates(kernel, "ieee", 90)
    options = tuning._options(kernel, among, CHIP, *sizes)
    assert len(tried) == len(options) >= 2
    assert best == options[1]
    wanted = tile_table.key(kernel, "ieee", *sizes)
    assert tile_table.lookup(CHIP, wanted) == list(best)
    assert configurations.as_config(tile_table.lookup(CHIP, wanted), among) == best
    assert tile_table.lookup(CHIP, tile_table.key(kernel, "ieee", 33, 64, 64)) == list(best)  # the same bucket
    assert tile_table.lookup(CHIP, tile_table.key(kernel, "ieee", 70, 64, 60)) is None
    assert tile_table.lookup(CHIP._replace(capability=100), wanted) is None
    assert [path.suffix for path in folder.iterdir()].count(".json") == 1


@pytest.mark.parametrize("kind", tuning.KINDS)
def test_the_strategy_is_measured_too(kind: str) -> None:
    assert tuning.tune_strategy(kind, "ieee", CPU, 40, 24, timer=timer_for(1), chip=CHIP) == "two-pass"
    assert tile_table.lookup(CHIP, tile_table.key(kind, "ieee", 40, 24)) == "two-pass"


def test_a_measurement_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the memory is taken: the call that asked for it goes on by the heuristic, and does not ask again."""

    def fail(*_: Any) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    calls: list[int] = []
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(tile_table, "chip_of", lambda device: CHIP)
    monkeypatch.setattr(tuning, "tune", fail)
    monkeypatch.setattr(tuning, "tune_strategy", fail)
    with tile_table.tiles("tune"):
        for expected in (2, 0):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                config = configurations.choose("forward", "half", cuda, 1024, 128, 128)
                strategy = configurations.strategy(torch.bfloat16, 1024, 128, cuda)
            assert config in configurations.candidates("forward", "half", 90)
            assert strategy == configurations.default_strategy("half", 1024, 128)
            texts = [str(w.message) for w in caught]
            assert len(texts) == expected
            assert all("could not measure tiles" in t and t.endswith("Tried to allocate 2 GiB.") for t in texts)
    assert len(calls) == 2


def test_tuning_inside_a_recording_launches_at_once() -> None:
    tape = Tape(CPU, False)
    with tape.recording():
        tuning.tune("forward", "ieee", CPU, 20, 20, 20, timer=timer_for(0), chip=CHIP)
    assert tape.launches == 0


def test_what_other_processes_found_is_kept(folder: Path) -> None:
    tile_table.remember(CHIP, {"forward half 16 16 16": [1, 2, 3, 4, 5, 1, 8]})
    path = tile_table.measured_path(CHIP)
    entries = tile_table.read(path)
    tile_table.write(path, CHIP.name, "x", {**entries, "layer half 16 16": {"choice": "plain", "measured": True}})
    tile_table.remember(CHIP, {"layer half 32 16": "fused"})
    assert set(tile_table.read(path)) == {"forward half 16 16 16", "layer half 16 16", "layer half 32 16"}
    assert not [p for p in folder.iterdir() if p.suffix not in (".json", ".lock")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\xff",
        '{"format": 1}',
        '{"format": 0, "entries": {}}',
        '{"format": 1, "entries": {"a": {"choice": [1.5]}}}',
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning(text: str) -> None:
    path = tile_table.measured_path(CHIP)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match="ignores its measured tiles.*(damaged|format)"):
        assert tile_table.lookup(CHIP, "forward half 16 16 16") is None
    with pytest.warns(RuntimeWarning, match="ignores"):
        tile_table.remember(CHIP, {"forward half 16 16 16": [1, 2, 3, 4, 5, 1, 8]})
    assert tile_table.lookup(CHIP, "forward half 16 16 16") == [1, 2, 3, 4, 5, 1, 8]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tile_table.FOLDER_VARIABLE, str(tmp_path / "file" / "folder"))
    with pytest.warns(RuntimeWarning, match="cannot keep"):
        tile_table.remember(CHIP, {"layer half 16 16": "plain"})
    assert tile_table.lookup(CHIP, "layer half 16 16") == "plain"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(tile_table.FOLDER_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert tile_table.lookup(CHIP, "layer half 16 16") is None
    with pytest.warns(RuntimeWarning, match="cannot keep its measured tiles.*RVAE_FAST_TUNING"):
        tile_table.remember(CHIP, {"layer half 16 16": "plain"})
    assert tile_table.lookup(CHIP, "layer half 16 16") == "plain"


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tile_table, "read", refuse)
    with pytest.warns(RuntimeWarning, match="ignores its measured tiles.*Permission denied"):
        assert tile_table.lookup(CHIP, "layer half 16 16") is None


def test_what_is_no_candidate_is_not_taken() -> None:
    among = configurations.candidates("weight", "half", 90)
    good = among[0]._replace(splits=7)
    assert configurations.as_config(list(good), among) == good
    for bad in ("fused", [1, 2], list(good._replace(block_m=512)), list(good._replace(splits=0)), None):
        assert configurations.as_config(bad, among) is None


class FakeCuda:
    """Stands for a CUDA device in the choice of tiles."""

    type = "cuda"


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_table, "chip_of", lambda device: CHIP)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuned: list[tuple[Any, ...]] = []
    among = configurations.candidates("forward", "half", 90)
    monkeypatch.setattr(tuning, "tune", lambda *a: (tuned.append(a), among[2])[1])
    device: Any = FakeCuda()
    shape = ("forward", "half", device, 8192, 512, 512)
    by_shape = configurations.heuristic("forward", among, CHIP.multiprocessors, 8192, 512, 512)
    assert tile_table.mode() == "table"
    assert configurations.choose(*shape) == by_shape
    assert not tuned
    with tile_table.tiles("tune"):
        assert configurations.choose(*shape) == among[2]
    assert len(tuned) == 1
    # Within a capture nothing can be measured, and what is said there does not hold after it.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    other = ("forward", "half", device, 1024, 512, 512)
    with tile_table.tiles("tune"):
        assert configurations.choose(*other) == configurations.heuristic("forward", among, 132, 1024, 512, 512)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert len(tuned) == 1
        assert configurations.choose(*other) == among[2]
    assert len(tuned) == 2
    tile_table.remember(CHIP, {tile_table.key("forward", "half", 8192, 512, 512): list(among[1])})
    tile_table.forget()
    assert among[1] != by_shape
    assert configurations.choose(*shape) == among[1]
    with tile_table.tiles("tune"):
        assert configurations.choose(*shape) == among[1]
    with tile_table.tiles("deterministic"):
        assert configurations.choose(*shape) == by_shape
    torch.use_deterministic_algorithms(True)
    try:
        assert configurations.choose(*shape) == by_shape
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(tuned) == 2
    with pytest.raises(ValueError, match="mode must be one of"), tile_table.tiles("fast"):
        pass
    monkeypatch.setenv(tile_table.MODE_VARIABLE, "fast")
    with pytest.raises(ValueError, match="RVAE_FAST_TILES must be one of"):
        tile_table.mode()


def test_tuning_moves_no_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose recording measures every choice leaves what a step without measuring leaves."""
    stack, x = make(12, 2), torch.randn(40, 12, requires_grad=True)
    expected = step(stack, x, torch.ones(40, 12), "triton")
    residual_stack._forward_tape.cache_clear()
    residual_stack_backward._backward_tape.cache_clear()
    made = []

    def choose(kernel: str, arithmetic: str, device: torch.device, m: int, n: int, k: int) -> TileConfig:
        made.append(kernel)
        options = len(tuning._options(kernel, configurations.candidates(kernel, arithmetic, 90), CHIP, m, n, k))
        return tuning.tune(kernel, arithmetic, CPU, m, n, k, timer=timer_for(options - 1), chip=CHIP)

    monkeypatch.setattr(configurations, "choose", choose)
    tuned = step(stack, x, torch.ones(40, 12), "triton")
    residual_stack._forward_tape.cache_clear()
    residual_stack_backward._backward_tape.cache_clear()
    assert set(made) == {"forward", "backward", "weight"}
    for name, value in expected.items():
        torch.testing.assert_close(tuned[name], value, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_the_shipped_table_is_sound() -> None:
    entries = tile_table.read(Path(tile_table.__file__).parent / "tiles_hopper.json")
    expected = tuning.by_arithmetic(tuning.H100)
    assert entries.keys() == expected.keys()
    for name, entry in entries.items():
        kernel, arithmetic = name.split()[:2]
        if kernel in tuning.KINDS:
            assert entry["choice"] in configurations.STRATEGIES
        else:
            among = configurations.candidates(kernel, arithmetic, 90, tuning.H100.shared_memory)
            assert configurations.as_config(entry["choice"], among) is not None
        if not entry["measured"]:
            assert entry == expected[name], f"{name}: not measured, so it must be the heuristic's"


def test_the_command_writes_a_table(tmp_path: Path) -> None:
    tuning.main([str(tmp_path / "t.json"), "--by-arithmetic"])
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["chip"] == tuning.H100.name
    assert not any(entry["measured"] for entry in written["entries"].values())
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            tuning.main([str(tmp_path / "t.json")])

"""Steps as graphs: the choice, what a captured step holds, and that training is the same either way."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import tape
import torch
from torch import Tensor

from rvae_fast import _graphs, _training_run
from rvae_fast._graphs import TIMED, WARMUP, StepGraph, step_graph
from rvae_fast.training import NonFiniteError, TrainingConfig, train


class Steps:
    """A step that adds an input to a total and notes what happened in Python."""

    def __init__(self, **device: Any) -> None:
        self.x, self.total = torch.zeros(()), torch.zeros(())
        self.device = tape.TapeDevice(**device)
        self.prepared = self.bodies = 0

    def prepare(self) -> None:
        self.prepared += 1

    def body(self) -> Tensor:
        self.bodies += 1
        self.total.add_(self.x)
        return self.total * 1.0

    def run(self, graph: StepGraph, values: range) -> list[float]:
        records = []
        for value in values:
            self.x.fill_(value)
            records.append(graph.run(self.prepare, self.body))
        return [float(r) for r in records]


def cumulative(n: int) -> list[float]:
    return [float(sum(range(i + 1))) for i in range(n)]


@pytest.mark.parametrize("eager_seconds", [0.5, 2.0])
def test_auto_times_both_and_keeps_the_faster(eager_seconds: float) -> None:
    steps = Steps(eager_seconds=eager_seconds, graph_seconds=1.0)
    graph = StepGraph(False, steps.device)
    n = WARMUP + 2 * TIMED + 20
    assert steps.run(graph, range(n)) == cumulative(n), "a step was lost, or taken twice, or its record overwritten"
    assert steps.prepared >= n
    assert graph.eager_seconds == eager_seconds
    assert graph.graph_seconds == 1.0
    assert steps.device.eager_steps == WARMUP + TIMED
    assert steps.device.readings == 4, "the device is waited for only at the ends of the timings"
    if eager_seconds > 1.0:
        assert graph.choice == "graph"
        assert steps.bodies == WARMUP + TIMED + 1
        assert steps.device.replays == n - WARMUP - TIMED
    else:
        assert graph.choice == "eager"
        assert steps.device.replays == 1 + TIMED
        assert graph._captured is None, "the graph's memory is still held"


def test_always_captures_without_timing() -> None:
    steps = Steps(eager_seconds=0.1, graph_seconds=1.0)
    graph = StepGraph(True, steps.device)
    assert steps.run(graph, range(WARMUP + 5)) == cumulative(WARMUP + 5)
    assert steps.device.readings == 0
    assert steps.device.replays == 5


def test_a_failed_capture_warns_and_goes_on() -> None:
    steps = Steps(fail=True)
    graph = StepGraph(False, steps.device)
    n = WARMUP + TIMED + 3
    with pytest.warns(UserWarning, match=r"without a CUDA graph: .*RuntimeError: operation not permitted") as caught:
        assert steps.run(graph, range(n)) == cumulative(n)
    assert len(caught) == 1
    assert graph.choice == "eager"


def test_a_failed_capture_raises_where_a_graph_was_asked_for() -> None:
    steps = Steps(fail=True)
    with pytest.raises(RuntimeError, match="cuda_graph=True was asked for, and the training step cannot be captured"):
        steps.run(StepGraph(True, steps.device), range(WARMUP + 1))


def test_invalidation_captures_again() -> None:
    steps = Steps()
    graph = StepGraph(False, steps.device)
    n = WARMUP + 2 * TIMED + 5
    steps.run(graph, range(n))
    graph.invalidate()
    steps.run(graph, range(5))
    assert len(steps.device.tapes) == 2
    assert graph.choice == "graph"
    assert steps.device.readings == 4, "settled once"
    graph = StepGraph(False, steps.device)
    graph.invalidate()
    assert graph.choice is None


def test_an_invalidation_amid_the_timing_leaves_what_was_timed() -> None:
    steps = Steps(eager_seconds=0.5, graph_seconds=1.0)
    graph = StepGraph(False, steps.device)
    steps.run(graph, range(WARMUP + TIMED + 5))
    graph.invalidate()
    steps.run(graph, range(TIMED + 5))
    assert (graph.eager_seconds, graph.graph_seconds) == (0.5, 1.0)
    assert graph.choice == "eager"


def test_which_devices_have_graphs() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert step_graph("auto", cpu, torch.float32, "adamw") is None
    assert step_graph(False, cpu, torch.float32, "adamw") is None
    assert step_graph("auto", cuda, torch.float64, "adamw") is None
    assert step_graph("auto", cuda, torch.float32, "radam") is None
    assert step_graph(False, cuda, torch.float32, "adamw") is None
    with pytest.raises(ValueError, match="cuda_graph must be 'auto' or False on cpu, which has no CUDA graphs"):
        step_graph(True, cpu, torch.float32, "adamw")
    with pytest.raises(ValueError, match=r"cuda_graph must be 'auto' or False for a model of torch.float64"):
        step_graph(True, cuda, torch.float64, "adamw")
    with pytest.raises(ValueError, match="cuda_graph must be 'auto' or False with optimizer='radam', whose steps are"):
        step_graph(True, cuda, torch.float32, "radam")


class FakeCuda:
    """PyTorch's captures as they are up to torch 2.11: one that CUDA calls invalid leaves allocator and generator in
    capture, and a pool may be released once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recording: set[Any] = set()  # pools that the allocator takes to be captured into
        self.held: set[Any] = set()  # pools whose memory is kept
        self.generator_captures = self.invalid = False
        self.captures = 0
        fake = self

        class Graph:
            def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
                fake.captures += 1
                self.pool, self.ended, fake.generator_captures = pool or (fake.captures, 0), False, True
                fake.recording.add(self.pool)
                fake.held.add(self.pool)

            def capture_end(self) -> None:
                if self.ended:
                    raise RuntimeError("capture_end() called before capture_begin()")
                self.ended = True
                if fake.invalid:
                    fake.invalid = False
                    raise RuntimeError("operation failed due to a previous error during capture")
                fake.recording.remove(self.pool)
                fake.held.remove(self.pool)  # as the graph is dropped in these tests
                fake.generator_captures = False

        def end(_device: int, pool: Any) -> None:
            if pool not in fake.recording:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            fake.recording.remove(pool)

        def release(_device: int, pool: Any) -> None:
            assert pool in fake.held, "released twice: PyTorch ends the process"
            fake.held.remove(pool)

        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
        for name in ("synchronize", "empty_cache", "Stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)


@pytest.mark.parametrize("invalid", [True, False])
def test_a_failed_capture_leaves_neither_allocator_nor_generator_in_it(
    invalid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that waits for the device makes the capture invalid; one that fails in Python alone does not."""
    cuda = FakeCuda(monkeypatch)

    def body() -> Tensor:
        cuda.invalid = invalid
        raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        _graphs.CudaDevice(torch.device("cuda", 0)).capture(body)
    assert not cuda.recording
    assert not cuda.held
    assert not cuda.generator_captures, "random numbers are refused from here on"


def test_a_capture_that_ends_invalid_leaves_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def body() -> Tensor:
        cuda.invalid = True  # by another thread, say
        return torch.ones(())

    with pytest.raises(RuntimeError, match="due to a previous error during capture"):
        _graphs.CudaDevice(torch.device("cuda", 0)).capture(body)
    assert not cuda.recording | cuda.held
    assert not cuda.generator_captures


def test_train_refuses_a_graph_on_the_cpu(model: Any, table: Any) -> None:
    with pytest.raises(ValueError, match="cuda_graph must be 'auto' or False on cpu"):
        train(model(), table(20), TrainingConfig(device="cpu", cuda_graph=True))


# --- training by the stand-in ---

OPTIONS: dict[str, Any] = {
    "batch_size": 8, "seed": 3, "learning_rate": 0.02, "max_grad_norm": 1.0, "kld_warmup_epochs": 1.5, "epochs": 4,
    "device": "cpu", "precision": "fp32", "sync_every": 5, "weight_decay": 0.01,
}  # fmt: skip


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``taped(capture=...)``: train on the CPU with tapes for graphs; without capture, eagerly by the same route."""
    monkeypatch.setattr(_graphs, "WARMUP", 2)
    monkeypatch.setattr(_graphs, "TIMED", 2)

    def install(*, capture: bool = True, always: bool = True, **device: Any) -> Any:
        made = tape.TapeDevice(**device)
        graph = StepGraph(always, made)
        if not capture:
            graph.choice = "eager"
        monkeypatch.setattr(_training_run, "step_graph", lambda *_: graph)
        return made

    return install


@pytest.mark.parametrize("name", ["RAE", "RVAE", "VAE"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_by_replays_is_training(
    name: str, accumulate: int, taped: Any, model: Any, table: Any, same: Any
) -> None:
    """Warm-up of the learning rate and of the KL weight, clipping, running statistics, samples of z, dropout, a short
    last batch: all as in eager steps, bit for bit."""
    data = table(60)  # 7 batches of 8 and one of 4
    options = {"dropout": 0.1} if name != "VAE" else {}
    config = TrainingConfig(**OPTIONS, accumulate=accumulate)
    taped(capture=False)
    expected = train(eager := model(name, **options), data, config)
    device = taped()
    history = train(graphed := model(name, **options), data, config)
    full_steps = {1: 7, 2: 3}[accumulate] * 4
    assert device.eager_steps == 2
    assert device.replays == full_steps - 2
    same(eager, graphed)
    assert (history.steps == expected.steps).all()


def test_the_route_of_graphs_is_the_plain_one(taped: Any, model: Any, table: Any) -> None:
    """Tensors for learning rate and KL weight change nothing but the last bits of the rate."""
    plain = train(model(), table(60), TrainingConfig(**OPTIONS))
    taped()
    graphed = train(model(), table(60), TrainingConfig(**OPTIONS))
    torch.testing.assert_close(torch.tensor(graphed.steps), torch.tensor(plain.steps), rtol=1e-4, atol=1e-5)


def test_resuming_reaches_the_same_bits(taped: Any, model: Any, table: Any, same: Any, tmp_path: Path) -> None:
    data, path = table(60), str(tmp_path / "run")
    taped()
    train(whole := model(), data, TrainingConfig(**OPTIONS))
    taped()
    stop = [lambda net, history: len(history.epochs) == 2]
    train(model(), data, TrainingConfig(**OPTIONS, checkpoint=path), callbacks=stop)
    # A callback's stop is final for that run; take its state as that of a run broken off there.
    from rvae_fast import _checkpoint

    tensors, header = _checkpoint.load(path)
    header["history"]["stopped_early"] = False
    _checkpoint.save(path, tensors, {k: v for k, v in header.items() if k not in ("format", "version")})
    taped()
    train(resumed := model(seed=1), data, TrainingConfig(**OPTIONS, checkpoint=path), resume=True)
    same(whole, resumed)
    taped(capture=False)  # and without graphs
    _checkpoint.save(path, tensors, {k: v for k, v in header.items() if k not in ("format", "version")})
    train(eager := model(seed=1), data, TrainingConfig(**OPTIONS, checkpoint=path), resume=True)
    same(whole, eager)


def test_a_bad_step_in_a_replay_is_found_and_blocked(taped: Any, model: Any, table: Any, same: Any) -> None:
    """The rows of one batch are spoilt during the run: weights and statistics stay those of the step before."""
    for capture in (False, True):
        data = table(64)
        taped(capture=capture)

        def spoil(net: Any, history: Any, data: Tensor = data) -> None:
            if len(history.epochs) == 2:
                data[10, 3] = float("nan")

        net = model()
        with pytest.raises(NonFiniteError, match="row 10, column 3 of the input is nan") as caught:
            train(net, data, TrainingConfig(**OPTIONS), callbacks=[spoil])
        assert all(torch.isfinite(t).all() for t in net.state_dict().values())
        if not capture:
            eager, steps = net, caught.value.step
    assert caught.value.step == steps
    same(eager, net)


def test_a_step_that_reads_the_device_cannot_be_captured(taped: Any, model: Any, table: Any) -> None:
    """A cumulative BatchNorm reads its count on the host: eager, with a warning, unless a graph was ordered."""
    net = model("VAE", momentum=None)
    taped(always=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = train(net, table(60), TrainingConfig(**OPTIONS))
    if any("without a CUDA graph" in str(w.message) for w in caught):
        assert len(history.epochs) == 4
    else:
        pytest.fail("the capture went through: the cumulative average is frozen at its first weight")
    taped()
    with pytest.raises(RuntimeError, match="cannot be captured"):
        train(model("VAE", momentum=None), table(60), TrainingConfig(**OPTIONS))


def test_callbacks_have_the_step_captured_anew(taped: Any, model: Any, table: Any) -> None:
    device = taped()
    train(model(), table(60), TrainingConfig(**OPTIONS), callbacks=[lambda net, history: None])
    assert len(device.tapes) == 4

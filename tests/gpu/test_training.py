"""Whole trainings on the GPU: by graphs and eagerly, broken off and resumed, and on one distributed rank."""

from __future__ import annotations

import copy
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rvae_fast
from rvae_fast import RVAE
from rvae_fast.training import NonFiniteError, TrainingConfig, train

OPTIONS: dict[str, Any] = {
    "epochs": 6, "batch_size": 64, "seed": 3, "learning_rate": 3e-3, "max_grad_norm": 1.0, "kld_warmup_epochs": 1.5,
}  # fmt: skip


def table(rows: int = 600, width: int = 24) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, generator=g) @ torch.randn(4, width, generator=g)


def model(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return RVAE(24, latent_features=4, widths=[32], blocks=[3], **options)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_graph_trains_as_eager_steps_do(accumulate: int, precision: str, cuda: torch.device) -> None:
    options = {**OPTIONS, "accumulate": accumulate, "precision": precision, "device": "cuda"}
    with warnings.catch_warnings():
        # Of a step that is not captured; not whatever PyTorch or Triton may have to say of this machine.
        warnings.filterwarnings("error", message="training goes on without")
        eager = train(one := model(dropout=0.1), table(), TrainingConfig(**options, cuda_graph=False))
        graph = train(two := model(dropout=0.1), table(), TrainingConfig(**options, cuda_graph=True))
        auto = train(three := model(dropout=0.1), table(), TrainingConfig(**options))
    assert (graph.steps == eager.steps).all()
    assert (auto.steps == eager.steps).all()
    assert_same(one, two)
    assert_same(one, three)


def test_a_step_that_cannot_be_captured_goes_on(cuda: torch.device) -> None:
    """A cumulative average reads its count on the host, which CUDA does not allow in a capture: random numbers and the
    allocator work after it as before."""
    options = {**OPTIONS, "device": "cuda"}
    eager = train(one := model(momentum=None), table(), TrainingConfig(**options, cuda_graph=False))
    with pytest.warns(UserWarning, match="training goes on without a CUDA graph"):
        auto = train(two := model(momentum=None), table(), TrainingConfig(**options))
    assert (auto.steps == eager.steps).all()
    assert_same(one, two)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        train(model(momentum=None), table(), TrainingConfig(**options, cuda_graph=True))
    torch.randn(10, device="cuda")
    # What other streams have used is given back: not while the allocator believes in a capture.
    before, stream = torch.cuda.memory_allocated(), torch.cuda.Stream()
    used = torch.empty(1 << 24, device="cuda")
    used.record_stream(stream)
    del used
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    assert torch.cuda.memory_allocated() <= before


def test_radam_trains_eagerly(cuda: torch.device) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training goes on without")
        history = train(model(), table(), TrainingConfig(**OPTIONS, device="cuda", optimizer="radam"))
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]


def test_resuming_by_a_graph(cuda: torch.device, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    options = {**OPTIONS, "device": "cuda", "cuda_graph": True}
    train(whole := model(), table(), TrainingConfig(**options))

    def stop(net: nn.Module, history: Any) -> None:
        if len(history.epochs) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model(), table(), TrainingConfig(**options, checkpoint=path), callbacks=[stop])
    train(resumed := model(seed=1), table(), TrainingConfig(**options, checkpoint=path), resume=True)
    assert_same(whole, resumed)


def test_a_bad_row_is_found_behind_a_graph(cuda: torch.device) -> None:
    data = table().cuda()
    net = model()

    def spoil(net: nn.Module, history: Any) -> None:
        if len(history.epochs) == 3:
            data[10, 3] = float("nan")

    with pytest.raises(NonFiniteError, match="row 10, column 3 of the input is nan"):
        train(net, data, TrainingConfig(**OPTIONS, device="cuda", cuda_graph=True), callbacks=[spoil])
    assert all(t.isfinite().all() for t in net.state_dict().values())


def test_the_gpu_learns_what_the_cpu_learns(device: torch.device) -> None:
    """Other random numbers, the same task: the losses end close to each other."""
    options = {**OPTIONS, "epochs": 15 if device.type == "cuda" else 2, "precision": "fp32"}
    cpu = train(model(), table(), TrainingConfig(**options, device="cpu"))
    with rvae_fast.backend("auto"):
        gpu = train(model(), table(), TrainingConfig(**options, device=device.type))
    ends = [history.epochs[-1]["train_loss"] for history in (cpu, gpu)]
    assert ends[1] < 1.15 * ends[0] + 0.1, ends


def test_a_compiled_model(cuda: torch.device) -> None:
    """Scoring and a training step of a whole network by the compiler, around this package's kernels."""
    torch.compiler.reset()
    net, x = model().to(cuda).eval(), table(70).to(cuda)
    compiled = torch.compile(net.loss, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net.loss(x), rtol=1e-4, atol=1e-4)
    net.train()
    compiled(x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_one_distributed_rank(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel's hooks on one rank change no gradient."""
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")  # a machine without a network has no other
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        stack = rvae_fast.ResidualStack(64, 4).to(cuda)
        twin = copy.deepcopy(stack)
        ddp = nn.parallel.DistributedDataParallel(twin, device_ids=[cuda.index])
        for _ in range(3):
            x = torch.randn(128, 64, device=cuda)
            for net in (stack, ddp):
                net.zero_grad()
                with torch.autocast("cuda", torch.bfloat16):
                    out = net(x)
                out.float().square().mean().backward()
        for a, b in zip(stack.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad)
    finally:
        torch.distributed.destroy_process_group()

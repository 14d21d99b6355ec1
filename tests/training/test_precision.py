from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rvae_fast._precision import has_native_bf16, resolve_device, resolve_precision
from rvae_fast.training import TrainingConfig, train

CPU = torch.device("cpu")
CPUINFO = Path("/proc/cpuinfo")


def pretend(monkeypatch: Any, *capabilities: str) -> None:
    found = dict.fromkeys(capabilities, True) | {"vnni": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)  # torch 2.9 has none


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ((), False),
        (("avx2", "fma3"), False),
        (("avx512_f", "amx_tile", "amx_int8"), False),
        (("avx512_f", "avx512_bf16"), True),
        (("amx_tile", "amx_bf16"), True),
        (("neon", "bf16"), True),
        (("neon", "fp16_arith"), False),
    ],
)
def test_native_bf16_on_cpu(monkeypatch: Any, capabilities: tuple[str, ...], native: bool) -> None:
    pretend(monkeypatch, *capabilities)
    assert has_native_bf16(CPU) == native
    assert resolve_precision("auto", CPU) == ("bf16" if native else "fp32")


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_native_bf16_on_cuda(monkeypatch: Any, capability: tuple[int, int], native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_native_bf16(torch.device("cuda:0")) == native


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "native"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_native_bf16_on_cpu_without_a_list_of_capabilities(
    monkeypatch: Any, avx512_bf16: bool, amx: bool, native: bool
) -> None:
    """torch 2.9 has no ``get_capabilities``, only questions, whose names later releases keep."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_native_bf16(CPU) == native


def test_this_cpu() -> None:
    """What torch says of this CPU is what the operating system says."""
    if platform.machine() != "x86_64" or not CPUINFO.is_file():
        pytest.skip(f"asks Linux about an x86 CPU; this is {platform.system()} on {platform.machine()}")
    flags = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.M)
    assert flags is not None
    assert has_native_bf16(CPU) == bool({"avx512_bf16", "amx_bf16"} & set(flags.group(1).split()))


def test_other_devices_and_dtypes(monkeypatch: Any) -> None:
    pretend(monkeypatch, "avx512_bf16")
    assert not has_native_bf16(torch.device("meta"))
    assert resolve_precision("auto", CPU, torch.float64) == "fp32"
    with pytest.raises(ValueError, match=r"^precision must be 'auto' or 'fp32' for a model of torch.float64"):
        resolve_precision("bf16", CPU, torch.float64)
    with pytest.raises(ValueError, match=r"^precision must be one of auto, fp32, bf16, got 'fp8'"):
        resolve_precision("fp8", CPU)


def test_emulated_bf16_warns(monkeypatch: Any) -> None:
    pretend(monkeypatch)
    with pytest.warns(UserWarning, match="bf16 is emulated on this device"):
        assert resolve_precision("bf16", CPU) == "bf16"


def test_bf16_computes_in_bf16_and_keeps_fp32(model, table, monkeypatch: Any) -> None:
    pretend(monkeypatch, "avx512_bf16")
    seen: dict[str, set[torch.dtype]] = {"auto": set(), "fp32": set()}
    losses = {}
    for precision, dtypes in seen.items():
        net = model()
        net.encoder[-1].register_forward_hook(lambda _m, _i, out, dtypes=dtypes: dtypes.add(out.dtype))
        config = TrainingConfig(epochs=20, batch_size=64, learning_rate=1e-2, precision=precision, seed=0)
        history = train(net, table(256), config, validation=table(64))
        losses[precision] = history.epochs[-1]["val_loss"]
        assert all(v.dtype in (torch.float32, torch.int64) for v in net.state_dict().values())
        assert history.precision == {"auto": "bf16", "fp32": "fp32"}[precision]
    assert seen == {"auto": {torch.bfloat16}, "fp32": {torch.float32}}
    assert losses["auto"] == pytest.approx(losses["fp32"], rel=0.1)


def test_fp64_model(model, table) -> None:
    net = model().double()
    history = train(net, table(64), TrainingConfig(epochs=1, seed=0))
    assert history.precision == "fp32"
    assert net.anomaly_score(table(64).double()).dtype == torch.float64


def test_resolve_device(model, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("auto", model()) == resolve_device("cpu") == CPU
    assert resolve_device("auto", model().to("meta")) == torch.device("meta")
    with pytest.raises(ValueError, match=r"^device must be present, got 'cuda': this torch sees no CUDA device"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match=r"^device must be 'auto' or a torch device .*, got 'gpu'"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto", model()) == resolve_device("cuda") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"^device must be present, got 'cuda:2': there are 2"):
        resolve_device("cuda:2")


def test_absent_device_is_refused(model, table) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match=r"^device must be present"):
        train(model(), table(8), TrainingConfig(device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False])
def test_cuda_gives_the_losses_of_the_cpu(standin, table, same, monkeypatch: Any, resident: bool) -> None:
    """fp64 and no noise: the same steps. Streamed through pinned memory or held on the device."""
    if not resident:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    options: dict[str, Any] = {"epochs": 3, "batch_size": 16, "accumulate": 2, "seed": 0, "validation_fraction": 0.1}
    one, two = standin(dtype=torch.float64), standin(dtype=torch.float64)
    cpu = train(one, table(200), TrainingConfig(device="cpu", **options))
    cuda = train(two, table(200), TrainingConfig(device="cuda", **options))
    torch.testing.assert_close(torch.from_numpy(cuda.steps), torch.from_numpy(cpu.steps), rtol=1e-9, atol=0)
    assert next(two.parameters()).is_cuda


@pytest.mark.gpu
def test_cuda_repeats_and_leaves_the_generators_alone(model, table, same) -> None:
    state = torch.cuda.get_rng_state()
    nets = [model(dropout=0.2), model(dropout=0.2)]
    for i, net in enumerate(nets):
        train(net, table(200), TrainingConfig(epochs=2, batch_size=16, seed=0, device="cuda", sync_every=1 + 6 * i))
    same(*nets)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_training_imports_only_what_it_uses() -> None:
    """No progress bar, no checkpoint: no rich, no safetensors; and never torch's compiler, which takes seconds."""
    code = """
import sys, torch
from rvae_fast.models import RVAE
from rvae_fast.training import TrainingConfig, train
train(RVAE(6, latent_features=2, n_layers=4), torch.rand(20, 6), TrainingConfig(epochs=1))
costly = ("rich", "safetensors", "torch._dynamo", "sympy", "sklearn", "matplotlib")
print([name for name in costly if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr

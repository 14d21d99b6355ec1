"""Which device to compute on, and in which precision."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

#: Names in `_cpu_capabilities` that mean bf16 products in hardware: x86 and Arm.
_CPU_BF16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def resolve_device(device: str | torch.device, model: nn.Module | None = None) -> torch.device:
    """The device meant by a ``device`` argument.

    Parameters
    ----------
    device : str or torch.device
        ``"auto"``: the device of ``model`` when that is not the CPU, else ``cuda`` where there is one, else ``cpu``.
    model : nn.Module, optional

    Returns
    -------
    torch.device
        With an index, for CUDA.

    Raises
    ------
    ValueError
        When there is no such device here.
    """
    if str(device) == "auto":
        own = next((p.device for p in model.parameters()), None) if model is not None else None
        if own is not None and own.type != "cpu":
            return own
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be 'auto' or a torch device such as 'cpu' or 'cuda:0', got {device!r}"
        ) from error
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device must be present, got {str(device)!r}: this torch sees no CUDA device")
        count, index = torch.cuda.device_count(), found.index
        if index is None:
            return torch.device("cuda", torch.cuda.current_device())
        if index >= count:
            raise ValueError(f"device must be present, got {str(device)!r}: there are {count} CUDA device(s)")
    elif found.type != "cpu":
        try:
            torch.empty(0, device=found)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise ValueError(f"device must be present, got {str(device)!r}: {error}") from error
    return found


def _cpu_capabilities() -> Mapping[str, Any]:
    """Instruction sets of this CPU, by torch's names."""
    collect = getattr(torch.cpu, "get_capabilities", None)
    if collect is not None:
        return collect()
    # The oldest torch, 2.9, answers for x86 only, one by one. AMX's tiles come with bf16 products in every CPU.
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }


def has_native_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bf16 in hardware.

    CUDA: compute capability 8.0 and up. CPU: AMX, AVX512_BF16, or Arm's BF16 extension (torch 2.9 cannot tell the last:
    no). Elsewhere: no.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = _cpu_capabilities()
        return any(capabilities.get(name, False) for name in _CPU_BF16)
    return False


def resolve_precision(precision: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """``"fp32"`` or ``"bf16"`` for a precision argument, a device and the dtype of the model's parameters.

    ``"auto"`` is ``"bf16"`` for an fp32 model on a device that has it natively. ``"fp32"`` means no autocast: a model
    in another dtype computes in that.

    Raises
    ------
    ValueError
        For an unknown name, or bf16 asked for a model that is not fp32 (autocast leaves fp64 alone).
    """
    if precision == "auto":
        return "bf16" if dtype == torch.float32 and has_native_bf16(device) else "fp32"
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be one of auto, fp32, bf16, got {precision!r}")
    if precision == "bf16":
        if dtype != torch.float32:
            raise ValueError(f"precision must be 'auto' or 'fp32' for a model of {dtype}, got 'bf16'")
        if not has_native_bf16(device):
            warnings.warn(f"bf16 is emulated on this device ({device}): expect it to be slower than fp32", stacklevel=2)
    return precision


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context that forward passes run in: autocast to bf16, or nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()

"""Random numbers by position: what a step draws depends on the seed and the step alone, never on what ran before.

So resuming at any step needs no generator state, and a failed step can be run again exactly.
"""

from __future__ import annotations

import contextlib
import hashlib

import torch
from torch import Tensor


def derive(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed for one ``purpose`` and ``index`` (BLAKE2b of all three: independent streams)."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_seed() -> int:
    """A seed from torch's global generator (advances it by one draw, as a ``DataLoader`` does)."""
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64).item())


def permutation(n: int, seed: int, purpose: str, index: int = 0) -> Tensor:
    """A random order of ``range(n)``, int64 on the CPU."""
    generator = torch.Generator().manual_seed(derive(seed, purpose, index))
    return torch.randperm(n, generator=generator)


def fork(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, the global generators may be reseeded freely; on leaving they are as they were."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def reseed(device: torch.device, seed: int) -> None:
    """Seed the global generators that models on ``device`` draw from."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)

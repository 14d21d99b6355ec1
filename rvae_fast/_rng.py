"""Random numbers by position: what a step draws depends on the seed and the step alone, never on what ran before.

So resuming at any step needs no generator state, and a failed step can be run again exactly.

The models draw from torch's global generators, which all threads share: who seeds one and draws from it takes
:func:`turn` meanwhile, so that trainings in several threads do not draw each other's numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rvae_fast._threads import ForkLock

_lock = ForkLock()
#: Of each generator that some :func:`fork` is over, by device: how many are, and its state before the first.
_forks: dict[torch.device, tuple[int, Tensor]] = {}


def derive(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed for one ``purpose`` and ``index`` (BLAKE2b of all three: independent streams)."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_seed() -> int:
    """A seed from torch's global generator (advances it by one draw, as a ``DataLoader`` does)."""
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu").item())


def permutation(n: int, seed: int, purpose: str, index: int = 0) -> Tensor:
    """A random order of ``range(n)``, int64 on the CPU."""
    generator = torch.Generator().manual_seed(derive(seed, purpose, index))
    return torch.randperm(n, generator=generator, device="cpu")


def turn() -> contextlib.AbstractContextManager[Any]:
    """Inside, no other thread that asks for its turn seeds the global generators; may be nested."""
    return _lock()


@contextlib.contextmanager
def fork(device: torch.device) -> Iterator[None]:
    """Inside, the global generators may be reseeded freely; on leaving they are as they were.

    Of several at once, in as many threads, the last to leave restores what the first has found.
    """
    devices = [torch.device("cpu")] + ([device] if device.type != "cpu" else [])
    with _lock():
        for at in devices:
            count, state = _forks.get(at) or (0, _module(at).get_rng_state(*_index(at)))
            _forks[at] = (count + 1, state)
    try:
        yield
    finally:
        with _lock():
            for at in devices:
                count, state = _forks.pop(at)
                if count > 1:
                    _forks[at] = (count - 1, state)
                else:
                    _module(at).set_rng_state(state, *_index(at))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, modules that are made draw their parameters from generators seeded with ``seed``.

    Those of the CPU and of torch's default device: ``torch.manual_seed`` would seed, and not give back, all GPUs'.
    """
    default = torch.get_default_device()
    device = default if default.type == "cuda" else torch.device("cpu")
    with _lock(), fork(device):
        torch.default_generator.manual_seed(seed)
        reseed(device, seed)
        yield


def _module(device: torch.device) -> Any:
    return torch.random if device.type == "cpu" else torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "cpu" else (device,)


def reseed(device: torch.device, seed: int) -> None:
    """Seed the global generators that models on ``device`` draw from."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)

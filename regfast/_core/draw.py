"""Random numbers of mixing: partners, weights and boxes. The host never waits for a device."""

from __future__ import annotations

import math
import os
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .checks import as_python

__all__ = ["PAIRINGS", "Stream", "beta", "boxes", "check_alpha", "check_generator", "pairing"]

PAIRINGS = ("random", "pairs", "flip", "roll")

_MAIN = -1  # outside a DataLoader worker; the seeds of workers are not negative


class Stream:
    """The random numbers of one module.

    A given generator is used as it is. Otherwise the stream owns a generator on the CPU. Its first
    use (a draw or a save of its state) seeds it with one number of torch's global CPU generator and
    with the rank of torch.distributed: torch.manual_seed makes it reproducible, and every rank
    differs.

    Each DataLoader worker holds a copy of its parent's stream, which would repeat the draws of the
    other workers. A worker therefore seeds its copy once, with a number of its own global generator
    (plus the initial seed of a given generator).

    Raises:
        TypeError: if `generator` is neither a torch.Generator nor None.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        check_generator(generator)
        self._given = generator is not None
        self._generator = torch.Generator() if generator is None else generator
        # The seed of the worker that seeded the generator, `_MAIN`, or None before seeding.
        self._home = None if generator is None else _worker()
        self._rank: int | None = None
        self._seeded_rank: int | None = None

    @property
    def generator(self) -> torch.Generator:
        """The seeded generator to draw from."""
        if self._home != _worker():
            seed = int(torch.randint(2**63 - 1, (), device="cpu")) + (
                self._generator.initial_seed() if self._given else 0
            )
            self._generator.manual_seed(_for_rank(seed, self._own_rank()))
            self._home, self._seeded_rank = _worker(), self._own_rank()
        elif not self._given and self._seeded_rank != self._own_rank():
            # All ranks seeded alike, before torch.distributed was initialised.
            self._reseed_for_rank()
        return self._generator

    def _reseed_for_rank(self) -> None:
        """Continue with a stream of this rank's own, derived from the current state."""
        seed = int(torch.randint(2**63 - 1, (), generator=self._generator, device="cpu"))
        self._generator.manual_seed(_for_rank(seed, self._own_rank()))
        self._seeded_rank = self._own_rank()

    def get_state(self) -> Tensor:
        """Return the state, a uint8 tensor; for a generator of its own it includes the rank."""
        state = self.generator.get_state()
        if self._given:
            return state
        rank = torch.tensor([self._own_rank()], device="cpu").view(torch.uint8)
        return torch.cat((state, rank))

    def set_state(self, state: Tensor) -> None:
        """Continue from a state that `get_state` returned.

        If every rank loads the state of one rank, the others continue with streams derived from it,
        and stay distinct.

        Raises:
            ValueError, TypeError: if `state` is no state of this kind of generator.
        """
        rank_bytes = 0 if self._given else 8
        expected = self._generator.get_state().numel() + rank_bytes
        if not isinstance(state, Tensor) or state.dtype != torch.uint8:
            raise TypeError(
                f"state must be a uint8 Tensor, got {getattr(state, 'dtype', type(state).__name__)}"
            )
        if state.shape != (expected,):
            owner = "a given" if self._given else "its own"
            kind = f"{owner} {self._generator.device.type} generator"
            raise ValueError(
                f"state of {kind} must have shape {(expected,)}, got {tuple(state.shape)}"
            )
        state = state.cpu()
        self._generator.set_state(state[: expected - rank_bytes])
        self._home = _worker()
        if not self._given:
            self._seeded_rank = int(state[-8:].clone().view(torch.int64))
            if self._seeded_rank != self._own_rank():
                self._reseed_for_rank()

    def _own_rank(self) -> int:
        rank = _rank()
        # A spawned DataLoader worker has no process group: its parent's rank came with the pickle.
        self._rank = self._rank if rank is None else rank
        return self._rank or 0

    def __getstate__(self) -> dict[str, Any]:
        # Bytes: a spawned process receives a tensor as a file descriptor, and this temporary tensor
        # would be freed first.
        generator = (str(self._generator.device), self._generator.get_state().numpy().tobytes())
        return {**self.__dict__, "_generator": generator, "_rank": self._own_rank()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device, numbers = state["_generator"]
        generator = torch.Generator(device)
        generator.set_state(torch.frombuffer(bytearray(numbers), dtype=torch.uint8))
        self.__dict__.update(state, _generator=generator)


def _worker() -> int:
    """Return the seed of the DataLoader worker that this process is, or `_MAIN`."""
    info = get_worker_info()
    return _MAIN if info is None else info.seed


def _rank() -> int | None:
    """Return this process's rank from torch.distributed or torchrun; None outside both."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else None


def _for_rank(seed: int, rank: int) -> int:
    """Return a seed for `rank`.

    The CPU's generator takes the lower 32 bits of a seed. An odd factor makes them differ.
    """
    return (seed + rank * 0x9E3779B97F4A7C15) % 2**64


def check_generator(generator: Any) -> None:
    """Raise a TypeError unless `generator` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}"
        )


def check_alpha(name: str, alpha: Any) -> float:
    """Return a parameter of `beta`, checked."""
    alpha = as_python(alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"{name} must be a number, got {alpha!r}")
    if not 0 <= float(alpha) < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {alpha}")
    return float(alpha)


def beta(alpha: float, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw from Beta(alpha, alpha), float32, on the generator's device.

    At alpha = 0 the draws are ones, which mix nothing. A draw is a ratio of two gamma variables,
    each computed as Gamma(alpha + 1) * U^(1/alpha) and in logarithms: for a small alpha both
    underflow, but their ratio does not. Source: Marsaglia and Tsang, "A Simple Method for
    Generating Gamma Variables" (2000).
    """
    if alpha == 0:
        return torch.ones(size, dtype=torch.float32, device=generator.device)
    raised = torch.full((2, *size), alpha + 1, dtype=torch.float64, device=generator.device)
    uniform = torch.rand(
        raised.shape, generator=generator, dtype=torch.float64, device=generator.device
    )
    gamma, power = torch._standard_gamma(raised, generator=generator).log(), (-uniform).log1p()
    # Subtract first: for the smallest alphas both quotients are infinite.
    return torch.sigmoid(gamma[0] - gamma[1] + (power[0] - power[1]) / alpha).float()


def pairing(name: str, batch: int, generator: torch.Generator) -> Tensor:
    """Return the partner of every sample, (batch,) int64, on the generator's device.

    "random" is torch.randperm, "pairs" a random perfect matching (the last sample of an odd batch
    is its own partner), "flip" timm's x.flip(0), "roll" torchvision's x.roll(1, 0).

    Raises:
        ValueError: for any other name.
    """
    device = generator.device
    if name == "random":
        return torch.randperm(batch, generator=generator, device=device)
    own = torch.arange(batch, device=device)
    if name == "pairs":
        half = batch // 2
        order = torch.randperm(2 * half, generator=generator, device=device)
        return own.scatter(0, order, order.roll(half))
    if name == "flip":
        return own.flip(0)
    if name == "roll":
        return own.roll(1)
    raise ValueError(f"pairing must be one of {', '.join(map(repr, PAIRINGS))}, got {name!r}")


def boxes(
    lam: Tensor, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw CutMix's boxes for lam, of any shape, on the generator's device; also correct lam.

    The boxes are (..., 4) int64 edges (y0, y1, x0, x1). A box has the image's proportions and
    1 - lam of its area, rounded down to whole pixels. Its centre is uniform, and the image clips
    it. The corrected lam, float32, is the share of the image outside the box. Source: Yun et al.,
    "CutMix" (2019); the rounding is timm's.
    """
    side = (1 - lam.double()).sqrt()
    edges = []
    for length in (height, width):
        cut = (length * side).long()
        centre = torch.randint(length, lam.shape, generator=generator, device=lam.device)
        edges += [(centre - cut // 2).clamp(0, length), (centre + (cut + 1) // 2).clamp(0, length)]
    y0, y1, x0, x1 = edges
    area = (y1 - y0) * (x1 - x0)
    return torch.stack(edges, -1), (1 - area.double() / (height * width)).float()

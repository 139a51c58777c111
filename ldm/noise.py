"""Gaussian noise that does not depend on the device or on who shares the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(
    shape: Sequence[int],
    generator: Generators = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of shape (B, …).

    The numbers are drawn on the generators' own device, CPU as a rule, and then moved: equal seeds
    give equal noise on every device.

    Args:
        shape: (B, …).
        generator: one generator for the whole batch, or B of them, so that a sample's noise does not
            depend on its neighbours; None takes torch's global one.

    Raises:
        ValueError: the number of generators is not B.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else torch.device("cpu")
        return torch.randn(tuple(shape), generator=generator, device=source).to(device, dtype)
    if len(generator) != shape[0]:
        raise ValueError(f"got {len(generator)} generators for a batch of {shape[0]}, expected one per sample")
    samples = [torch.randn(tuple(shape[1:]), generator=g, device=g.device).to(device, dtype) for g in generator]
    return torch.stack(samples)

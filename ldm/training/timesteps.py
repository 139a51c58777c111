"""Which timesteps are trained on, where that follows from the losses so far."""

from __future__ import annotations

import torch
from torch import Tensor


class LossAwareTimesteps:
    """Draws a timestep in proportion to the root mean square of its last losses.

    All are drawn alike until each has been seen ten times, and one in a thousand later on. Losses are to be multiplied
    by `weight`, which keeps the mean what it is with uniform draws, with less variance.

    Args:
        num_timesteps: T.

    Source: Nichol & Dhariwal 2021, section 3.3 (Eq. 18).
    """

    HISTORY = 10
    UNIFORM = 0.001

    def __init__(self, num_timesteps: int) -> None:
        self.losses = torch.zeros(num_timesteps, self.HISTORY, dtype=torch.float64)
        self.counts = torch.zeros(num_timesteps, dtype=torch.long)
        self._refresh()

    def draw(self, generator: torch.Generator) -> Tensor:
        """One timestep, () int64."""
        u = torch.rand((), generator=generator, dtype=torch.float64)
        return torch.searchsorted(self._cumulated, u, right=True).clamp(max=len(self.counts) - 1)

    def weight(self, t: Tensor) -> Tensor:
        """(B,) float32: 1 / (T p(t)) of timesteps (B,)."""
        return (1.0 / (len(self.counts) * self._p[t.cpu()])).float().to(t.device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember losses (B,) of timesteps (B,), from all processes in the same order."""
        for k, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self.losses[k, self.counts[k] % self.HISTORY] = loss
            self.counts[k] += 1
        self._refresh()

    def _refresh(self) -> None:
        T = len(self.counts)
        p = torch.full((T,), 1.0 / T, dtype=torch.float64)
        if int(self.counts.min()) >= self.HISTORY:
            scale = self.losses.square().mean(1).sqrt()
            p = (1.0 - self.UNIFORM) * scale / scale.sum() + self.UNIFORM / T
        self._p, self._cumulated = p, p.cumsum(0)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()
        self._refresh()

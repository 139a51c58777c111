"""The UNet of denoising-diffusion-pytorch, as small as it can be, to run our losses and samplers on its numbers.

Written from a description of it, not from its code; attribute names are those of its files.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from tests.lineage import fill


class Norm(nn.Module):
    """x / |x| over channels, times a gain and the root of their number."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class Block(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(channels, out_channels, 3, padding=1), Norm(out_channels)

    def forward(self, x: Tensor, scale: Tensor | float = 0.0, shift: Tensor | float = 0.0) -> Tensor:
        return F.silu(self.norm(self.proj(x)) * (1 + scale) + shift)


class Residual(nn.Module):
    def __init__(self, channels: int, out_channels: int, embedded: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(embedded, 2 * out_channels))
        self.block1, self.block2 = Block(channels, out_channels), Block(out_channels, out_channels)
        self.res_conv = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.mlp(embedding)[:, :, None, None].chunk(2, dim=1)
        return self.block2(self.block1(x, scale, shift)) + self.res_conv(x)


class Attention(nn.Module):
    """Over positions with 4 learned keys and values in front; or linear, of features."""

    def __init__(self, channels: int, linear: bool, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.linear, inner = heads, linear, heads * width
        self.norm = Norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.mem_kv = nn.Parameter(torch.zeros(2, heads, *((width, 4) if linear else (4, width))))
        out = nn.Conv2d(inner, channels, 1)
        self.to_out = nn.Sequential(out, Norm(channels)) if linear else out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b (n h c) y x -> n b h c (y x)", n=3, h=self.heads)
        mem = repeat(self.mem_kv, "n h a c -> n b h a c", b=len(x))
        mem_k, mem_v = mem if self.linear else mem.transpose(-1, -2)
        k, v = torch.cat([mem_k, k], dim=-1), torch.cat([mem_v, v], dim=-1)
        q_scale = q.shape[2] ** -0.5
        if self.linear:
            hidden = (v @ k.softmax(-1).mT) @ (q.softmax(-2) * q_scale)
        else:
            hidden = v @ ((q * q_scale).mT @ k).softmax(-1).mT
        return self.to_out(rearrange(hidden, "b h c (y x) -> b (h c) y x", y=x.shape[2])) + x


class Embedding(nn.Module):
    """Sines first; or of learned frequencies, with t in front."""

    def __init__(self, dim: int, learned: int, theta: float) -> None:
        super().__init__()
        self.dim, self.theta = dim, theta
        if learned:
            self.weights = nn.Parameter(torch.zeros(learned // 2))

    def forward(self, t: Tensor) -> Tensor:
        if hasattr(self, "weights"):
            angles = t[:, None].float() * self.weights * 2 * math.pi
            return torch.cat([t[:, None].float(), angles.sin(), angles.cos()], dim=1)
        half = self.dim // 2
        angles = t[:, None] * torch.exp(torch.arange(half) * -(math.log(self.theta) / (half - 1)))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class LineageUNet(nn.Module):
    """Called as our UNet is: (x, t, labels); of two inputs the second one is the earlier prediction, theirs the first.

    `flags` are the arguments of theirs.
    """

    def __init__(self, flags: dict, prefix: str) -> None:
        super().__init__()
        dim, self.channels = flags["dim"], flags["channels"]
        self.twice = flags.get("self_condition", False)
        dims = [flags.get("init_dim", dim), *(dim * m for m in flags["dim_mults"])]
        n = len(dims) - 1
        learned = flags.get("learned_sinusoidal_dim", 16) if flags.get("learned_sinusoidal_cond") else 0
        out = flags.get("out_dim", self.channels * (2 if flags.get("learned_variance") else 1))
        self.init_conv = nn.Conv2d(self.channels * (1 + self.twice), dims[0], 7, padding=3)
        embedding = Embedding(dim, learned, flags.get("sinusoidal_pos_emb_theta", 10000))
        linear = nn.Linear(learned + 1 if learned else dim, 4 * dim)
        self.time_mlp = nn.Sequential(embedding, linear, nn.GELU(), nn.Linear(4 * dim, 4 * dim))
        heads, width = (v if isinstance(v, list) else [v] * n for v in (flags["attn_heads"], flags["attn_dim_head"]))
        full = flags.get("full_attn", [False] * (n - 1) + [True])
        kinds = [(not full[i], heads[i], width[i]) for i in range(n)]
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i in range(n):
            a, b = dims[i], dims[i + 1]
            down: nn.Module = nn.Conv2d(a, b, 3, padding=1)
            if i < n - 1:
                down = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * a, b, 1))
            blocks = Residual(a, a, 4 * dim), Residual(a, a, 4 * dim)
            self.downs.append(nn.ModuleList([*blocks, Attention(a, *kinds[i]), down]))
        c = dims[-1]
        self.mid_block1, self.mid_block2 = Residual(c, c, 4 * dim), Residual(c, c, 4 * dim)
        self.mid_attn = Attention(c, False, heads[-1], width[-1])
        for i in reversed(range(n)):
            a, b = dims[i], dims[i + 1]
            up: nn.Module = nn.Conv2d(b, a, 3, padding=1)
            if i > 0:
                up = nn.Sequential(nn.Upsample(scale_factor=2.0), up)
            blocks = Residual(a + b, b, 4 * dim), Residual(a + b, b, 4 * dim)
            self.ups.append(nn.ModuleList([*blocks, Attention(b, *kinds[i]), up]))
        self.final_res_block = Residual(2 * dims[0], dims[0], 4 * dim)
        self.final_conv = nn.Conv2d(dims[0], out, 1)
        fill(self, prefix)

    @property
    def time_embed(self) -> nn.Sequential:
        """Where our model looks for the weights' type."""
        return self.time_mlp[1:]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.twice:
            x = torch.cat([x[:, self.channels :], x[:, : self.channels]], dim=1)
        first = x = self.init_conv(x)
        embedding, skips = self.time_mlp(t), []
        for block1, block2, attention, down in self.downs:
            x = block1(x, embedding)
            skips.append(x)
            x = attention(block2(x, embedding))
            skips.append(x)
            x = down(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, embedding)), embedding)
        for block1, block2, attention, up in self.ups:
            x = block1(torch.cat([x, skips.pop()], dim=1), embedding)
            x = up(attention(block2(torch.cat([x, skips.pop()], dim=1), embedding)))
        return self.final_conv(self.final_res_block(torch.cat([x, first], dim=1), embedding))

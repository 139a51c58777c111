"""The first stage: pixels to latents and back, with a plain decoder or one that also reads the known pixels.

Dimensions: B batch · H, W pixels · h, w latent cells (H / f, W / f) · Z latent channels.
Sources: Rombach et al. 2022, section 3.1 and appendix G (KL-regularised autoencoder); Zhu et al. 2023, "Designing a
Better Asymmetric VQGAN for StableDiffusion" (mask-conditioned decoder).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import AutoencoderConfig
from ldm.diffusion import Generators, draw_noise
from ldm.models.layers import Upsample, attention


class DiagonalGaussian:
    """A Gaussian posterior with a diagonal covariance, from moments (B, 2Z, h, w): means (the mode), log variances."""

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def __getitem__(self, index: Sequence[int]) -> "DiagonalGaussian":
        """Return the posteriors of the chosen images, in that order; an image may be chosen several times."""
        return DiagonalGaussian(torch.cat([self.mean[index], self.logvar[index]], dim=1))

    def sample(self, source: Generators | Tensor = None) -> Tensor:
        """Draw a latent, (B, Z, h, w): mean + std noise; `source` is the noise, a generator, or one per sample.

        A single posterior gives as many samples as there are generators.
        """
        if not isinstance(source, Tensor):
            batch = len(source) if isinstance(source, Sequence) and len(self.mean) == 1 else len(self.mean)
            source = draw_noise((batch, *self.mean.shape[1:]), source, device=self.mean.device)
        return self.mean + (0.5 * self.logvar).exp() * source.to(self.mean.dtype)

    def kl(self) -> Tensor:
        """Compute the divergence from the standard normal, (B,), in nats, summed over the latent."""
        # KL(N(mu, s^2) || N(0, 1)) = (mu^2 + s^2 - 1 - log s^2) / 2
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


def _norm(groups: int, channels: int) -> nn.Module:
    """Build a group norm, or an identity for 0 groups: small autoencoders lose absolute colour to norms."""
    return nn.GroupNorm(groups, channels, eps=1e-6) if groups else nn.Identity()


class ResnetBlock(nn.Module):
    """Two convolutions and a residual."""

    def __init__(self, config: AutoencoderConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(config.norm_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(config.norm_groups, out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return self.nin_shortcut(x) + hidden


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = _norm(norm_groups, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(proj(normed), "b c h w -> b (h w) c") for proj in (self.q, self.k, self.v))
        mixed = rearrange(attention(q, k, v, num_heads=1), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    """Halve the grid; padding on the right and the bottom only, as in the checkpoint's training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _level(config: AutoencoderConfig, widths: list[int], change: str | None) -> nn.Sequential:
    """Build blocks of one resolution, followed by the change of resolution where the level has one."""
    level = nn.Sequential(OrderedDict(block=nn.Sequential(*(ResnetBlock(config, a, b) for a, b in pairwise(widths)))))
    if change is not None:
        level.add_module(change, {"downsample": Downsample, "upsample": Upsample}[change](widths[-1]))
    return level


def _middle(config: AutoencoderConfig, channels: int) -> nn.Sequential:
    """Build two blocks around an attention, at the lowest resolution."""
    block_1, attention = ResnetBlock(config, channels, channels), AttnBlock(channels, config.norm_groups)
    block_2 = ResnetBlock(config, channels, channels)
    return nn.Sequential(OrderedDict(block_1=block_1, attn_1=attention, block_2=block_2))


def cosine_patches(side: int, count: int) -> Tensor:
    """Return the `count` orthonormal patterns (count, 3 · side²) that matter most in photographs.

    They are products of cosines in luminance and two colour differences of squares of RGB pixels, channels first,
    ordered by rough standard deviations of their coefficients for pixels in [-1, 1], by 1 / f noise.

    Source: Ahmed, Natarajan and Rao 1974 (the discrete cosine transform).
    """
    n = np.arange(side)
    waves = np.cos(np.pi * np.outer(n, 2 * n + 1) / (2 * side)) * np.sqrt(np.where(n, 2, 1) / side)[:, None]
    colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    sizes = side * np.multiply.outer([0.6, 0.25, 0.15], (1.0 + n[:, None] + n) ** -1.7)
    patterns = np.einsum("kc,ui,vj->kuvcij", colours, waves, waves).reshape(sizes.size, -1)
    chosen = np.argsort(-sizes, axis=None, kind="stable")[:count]
    return torch.from_numpy(patterns[chosen]).float()


class Encoder(nn.Module):
    """Encode pixels as posterior moments, before `quant_conv`; with a linear map of each cell's pixels beside it."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.ch * multiplier for multiplier in config.ch_mult]
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            _level(config, [a] + config.num_res_blocks * [b], "downsample" if i < len(widths) else None)
            for i, (a, b) in enumerate(pairwise([config.ch, *widths]), 1)
        )
        self.mid = _middle(config, widths[-1])
        self.norm_out = _norm(config.norm_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)
        self.cell, pixels = config.downsampling, config.in_channels * config.downsampling**2
        self.linear = nn.Conv2d(pixels, 2 * config.z_channels, 1) if config.linear_path else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        for level in self.down:
            hidden = level(hidden)
        moments = self.conv_out(F.silu(self.norm_out(self.mid(hidden))))
        return moments + self.linear(F.pixel_unshuffle(x, self.cell)) if self.linear else moments


class LinearEncoder(nn.Module):
    """Encode pixels as posterior moments by a linear map of each cell's pixels alone."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.cell, pixels = config.downsampling, config.in_channels * config.downsampling**2
        self.linear = nn.Conv2d(pixels, 2 * config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.pixel_unshuffle(x, self.cell))


class Decoder(nn.Module):
    """Decode latents to pixels, after `post_quant_conv`; one block more per level than the encoder."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.ch * multiplier for multiplier in config.ch_mult]
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _middle(config, widths[-1])
        # `up` is indexed by resolution, finest first, and run from the coarsest.
        self.up = nn.ModuleList(
            _level(config, [a] + (config.num_res_blocks + 1) * [b], "upsample" if i else None)
            for i, (b, a) in enumerate(pairwise([*widths, widths[-1]]))
        )
        self.norm_out = _norm(config.norm_groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels * config.patch_size**2, 3, padding=1)
        self.cell, pixels = config.downsampling, config.in_channels * config.downsampling**2
        self.linear = nn.Conv2d(config.z_channels, pixels, 1) if config.linear_path else None

    def forward(self, z: Tensor, image: Tensor | None = None, keep_mask: Tensor | None = None) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.pixels(x, z)

    def pixels(self, x: Tensor, z: Tensor) -> Tensor:
        """Turn the features at full resolution into pixels; add the linear map of the latent, if there is one."""
        pixels = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch_size)
        return pixels + self.linear_pixels(z) if self.linear else pixels

    def linear_pixels(self, z: Tensor) -> Tensor:
        """Compute the linear path's share of the pixels (B, 3, H, W)."""
        assert self.linear is not None
        return F.pixel_shuffle(self.linear(z), self.cell)


class ConditionEncoder(nn.Module):
    """Encode known pixels as features as wide as the decoder's, finest first: twice full resolution, then halves."""

    def __init__(self, in_channels: int, widths: list[int]) -> None:
        super().__init__()
        pairs = list(pairwise([in_channels, *widths, widths[-1]]))
        same = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairs[:2]]
        self.layers = nn.Sequential(*same, *(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairs[2:]))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for layer in self.layers:
            features.append(layer(x))  # not activated: the decoder's next block does that
            x = F.relu(features[-1])
        return features


class MaskConditionedDecoder(Decoder):
    """The plain decoder, wider and deeper if the config says so, with a branch for known pixels.

    At every resolution the branch's features replace the decoder's own where pixels are known. The encoder, hence the
    latents, are the plain ones.

    Source: Zhu et al. 2023, section 3. Their masks and those of `diffusers` are 1 in the hole; `keep_mask` is 1 where
    pixels are known, as everywhere in this project.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        blocks = config.num_res_blocks if config.decoder_res_blocks is None else config.decoder_res_blocks
        config = replace(config, ch=round(config.decoder_width * config.ch), num_res_blocks=blocks)
        super().__init__(config)
        widths = [config.ch * multiplier for multiplier in config.ch_mult]
        self.encoder = ConditionEncoder(config.in_channels * config.patch_size**2, widths)  # the published name

    def forward(self, z: Tensor, image: Tensor | None = None, keep_mask: Tensor | None = None) -> Tensor:
        if image is None or keep_mask is None:
            return super().forward(z)
        kept = (keep_mask > 0.5).to(z.dtype)
        features = self.encoder(F.pixel_unshuffle(image * kept, self.patch_size))
        kept = F.pixel_unshuffle(kept, self.patch_size).amin(1, keepdim=True)  # a square is known if all of it is
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(_insert_known(x, features.pop(), kept))
        return self.pixels(_insert_known(x, features.pop(), kept), z)


def _insert_known(x: Tensor, features: Tensor, kept: Tensor) -> Tensor:
    """Take `features` where pixels are kept, the decoder's x elsewhere."""
    return torch.where(F.interpolate(kept, size=x.shape[2:], mode="nearest") > 0.5, features, x)


class AutoencoderKL(nn.Module):
    """KL-regularised autoencoder with a Gaussian posterior, and the decoder that the config names."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = (LinearEncoder if config.encoder == "linear" else Encoder)(config)
        self.decoder = (MaskConditionedDecoder if config.decoder == "asymmetric" else Decoder)(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        if config.linear_path:
            self.start_linear()

    def start_linear(self) -> None:
        """Start as an orthonormal cosine transform that keeps the largest coefficients; the networks add nothing yet.

        The channels of its latents differ in size as they matter in pixels: `model.latent_std`. The posterior is
        narrower than what 8 bits per colour resolve.
        """
        encode, decode = self.encoder.linear, self.decoder.linear
        assert encode is not None and decode is not None
        patterns = cosine_patches(self.downsampling, self.config.z_channels)
        with torch.no_grad():
            encode.weight.copy_(torch.cat([patterns, torch.zeros_like(patterns)])[:, :, None, None])
            decode.weight.copy_(patterns.T[:, :, None, None])
        for conv in (self.quant_conv, self.post_quant_conv):
            nn.init.dirac_(conv.weight)
        outputs = [net.conv_out for net in (self.encoder, self.decoder) if not isinstance(net, LinearEncoder)]
        for conv in outputs:
            nn.init.zeros_(conv.weight)
        for bias in (conv.bias for conv in (encode, decode, self.quant_conv, self.post_quant_conv, *outputs)):
            assert bias is not None
            nn.init.zeros_(bias)
        self.start_posterior(-12.0)

    def start_posterior(self, logvar: float) -> None:
        """Start the posterior's log variances at `logvar`, to which an untrained encoder adds little."""
        assert self.quant_conv.bias is not None
        self.quant_conv.bias.detach().chunk(2)[1].fill_(logvar)

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell and side: 8 for Stable Diffusion."""
        return self.config.downsampling

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Encode (B, 3, H, W) pixels in [-1, 1] as the posterior of the (B, Z, h, w) latent, not yet scaled."""
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor, image: Tensor | None = None, keep_mask: Tensor | None = None) -> Tensor:
        """Decode (B, Z, h, w) unscaled latents to (B, 3, H, W) pixels, about [-1, 1] and not clamped.

        A mask-conditioned decoder reads `image`, (B, 3, H, W) in [-1, 1], where `keep_mask`, (B, 1, H, W), is above
        0.5; it returns known pixels about, not exactly, as they were. Without either no pixels are known.
        """
        return self.decoder(self.post_quant_conv(z), image, keep_mask)

    def decode_linear(self, z: Tensor) -> Tensor:
        """Decode (B, Z, h, w) unscaled latents to (B, 3, H, W) pixels by the linear path alone, fast and less sharp."""
        return self.decoder.linear_pixels(self.post_quant_conv(z))

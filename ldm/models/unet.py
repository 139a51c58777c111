"""The denoising UNet: of Stable Diffusion with the input channels of the task, or of ADM for pixels.

Dimensions: B batch · h, w latent cells · L context tokens · D token channels · E channels of the timestep embedding.
Sources: Nichol & Dhariwal 2021 and Dhariwal & Nichol 2021 (ADM) for the layout, Rombach et al. 2022 for transformers,
Yang et al. 2023 (Paint by Example) for the nine input channels and the one-token context.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.config import ConfigError, UNetConfig
from ldm.diffusion import send
from ldm.models.layers import AttentionBlock, SpatialTransformer, Upsample, timestep_embedding, zero_init

Projectable = Tensor | Sequence[Tensor]  # read by all layers, or projected for each, in the order of their use


class ResBlock(nn.Module):
    """Two convolutions with the timestep embedding in between, and a residual; `resample` (ADM) changes the grid."""

    def __init__(
        self, config: UNetConfig, channels: int, out_channels: int, resample: Callable[[], nn.Module] = nn.Identity
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = config.scale_shift, resample()
        embedded, read = 4 * config.model_channels, (1 + config.scale_shift) * out_channels
        convolution = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(config.norm_groups, channels), nn.SiLU(), convolution)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedded, read))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(config.norm_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def project(self, embedding: Tensor) -> Tensor:
        """Compute what is read of the timestep embedding: (B, E) -> (B, C_out or 2 C_out, 1, 1)."""
        return self.emb_layers(embedding)[:, :, None, None]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, h, w), (B, E) or what `project` made of it -> (B, C_out, h, w), in the grid of `resample`."""
        # by the class: the method of a sharded block gathers the weights and drops them again
        read = ResBlock.project(self, embedding) if embedding.ndim == 2 else embedding
        norm, activation, convolution = self.in_layers
        hidden = convolution(self.resample(activation(norm(x))))
        norm, *layers = self.out_layers
        if self.scale_shift:
            scale, shift = read.chunk(2, dim=1)
            hidden = norm(hidden) * (1 + scale) + shift
        else:
            hidden = norm(hidden + read)
        for layer in layers:
            hidden = layer(hidden)
        return self.skip_connection(self.resample(x)) + hidden


class Stage(nn.ModuleList):
    """Layers in sequence; residual blocks also read one of `embeddings`, transformers one of `contexts`."""

    activation_checkpointing = False

    def forward(self, x: Tensor, embeddings: Iterator[Tensor], contexts: Iterator[Tensor]) -> Tensor:
        for layer in self:
            read = [next(embeddings)] if isinstance(layer, ResBlock) else []
            read += [next(contexts)] if isinstance(layer, SpatialTransformer) else []
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, *read, use_reentrant=False)
            else:
                x = layer(x, *read)
        return x


class UNetEncoder(nn.Module):
    """The UNet down to its middle; control networks have a copy of it. Norm groups and heads must divide the widths.

    `skip_channels` holds the widths of the input blocks' outputs, in order.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        name = "head_channels" if config.head_channels else "num_heads"
        heads = getattr(config, name)
        for width in [config.model_channels, *config.level_channels]:
            if width % config.norm_groups or width % heads:
                divisors = f"norm_groups ({config.norm_groups}) and {name} ({heads})"
                raise ConfigError(f"model.unet: got a width of {width} channels, expected a multiple of {divisors}")
        embedded, factor = 4 * config.model_channels, 1
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, embedded), nn.SiLU(), nn.Linear(embedded, embedded)
        )
        if config.num_classes:
            self.label_emb = nn.Embedding(config.num_classes, embedded)

        channels = config.model_channels if config.context_dim else config.level_channels[0]
        input_blocks = [Stage([nn.Conv2d(config.in_channels, channels, 3, padding=1)])]
        skip_channels = [channels]
        for level, width in enumerate(config.level_channels):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(config, channels, width)]
                channels = width
                if factor in config.attention_resolutions:
                    layers.append(self.attention(channels))
                input_blocks.append(Stage(layers))
                skip_channels.append(channels)
            if level < len(config.level_channels) - 1:
                input_blocks.append(Stage([self._down(channels)]))
                skip_channels.append(channels)
                factor *= 2
        self.input_blocks = nn.ModuleList(input_blocks)
        self.skip_channels = tuple(skip_channels)

        middle = ResBlock(config, channels, channels), self.attention(channels)
        self.middle_block = Stage([*middle, ResBlock(config, channels, channels)])

    def attention(self, channels: int, num_heads: int | None = None) -> nn.Module:
        """Build a transformer, or without context an attention block, for maps of `channels`."""
        config = self.config
        if config.context_dim:
            return SpatialTransformer(config, channels)
        heads = channels // config.head_channels if config.head_channels else num_heads or config.num_heads
        return AttentionBlock(channels, heads, config.norm_groups)

    def _down(self, channels: int) -> nn.Module:
        if self.config.resample == "res_block":
            return ResBlock(self.config, channels, channels, partial(nn.AvgPool2d, 2))
        if self.config.resample == "pool":
            return nn.AvgPool2d(2)
        return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))

    def embed(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed timesteps (B,) as (B, E)."""
        t = t if self.config.time_scale == 1 else t * self.config.time_scale
        return self.time_embed(timestep_embedding(t, self.config.model_channels).to(dtype))

    def condition(self, t: Projectable, context: Projectable | None) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
        """Return what residual blocks and transformers read beside x, in the order of their use."""
        if not isinstance(t, Tensor):
            return iter(t), iter(cast(Sequence[Tensor], context))
        if self.config.context_dim:
            context = cast(Tensor, context)
            return repeat(self.embed(t, context.dtype)), repeat(context)
        embedding = self.embed(t, next(self.parameters()).dtype)
        if self.config.num_classes:
            labels = cast(Tensor, context)
            embedding = embedding + self.label_emb(labels.clamp(min=0)) * (labels >= 0)[:, None]
        return repeat(embedding), iter(())

    def prepare(self, timesteps: Sequence[int], context: Tensor) -> Callable[..., Any]:
        """Compute once what the layers read of the timesteps of a sampling run and of its context (B, L, D).

        Returns the network as a function of x, a timestep and further arguments; x are the last samples of the batch.
        """
        layers = list(self.modules())  # in the order of their use
        embeddings = self.embed(send(torch.tensor(timesteps), context.device), context.dtype)
        shifts = [layer.project(embeddings).split(1) for layer in layers if isinstance(layer, ResBlock)]
        contexts = [layer.project(context) for layer in layers if isinstance(layer, SpatialTransformer)]
        at = dict(zip(timesteps, zip(*shifts, strict=True), strict=True))
        return lambda x, t, *others: self(x, at[t], [layer[:, :, -len(x) :] for layer in contexts], *others)


class UNetModel(UNetEncoder):
    """Predicts the noise (or v, or x_0) in a latent from timestep and context."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        skip_channels = list(self.skip_channels)
        channels, factor = skip_channels[-1], 2 ** (len(config.level_channels) - 1)
        output_blocks = []
        for level, width in reversed(list(enumerate(config.level_channels))):
            for i in range(config.num_res_blocks + 1):
                layers: list[nn.Module] = [ResBlock(config, channels + skip_channels.pop(), width)]
                channels = width
                if factor in config.attention_resolutions:
                    layers.append(self.attention(channels, config.num_heads_upsample))
                if level > 0 and i == config.num_res_blocks:
                    resample = {"conv": channels, "pool": 0}.get(config.resample)
                    layers.append(
                        ResBlock(config, channels, channels, Upsample) if resample is None else Upsample(resample)
                    )
                    factor //= 2
                output_blocks.append(Stage(layers))
        self.output_blocks = nn.ModuleList(output_blocks)

        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, config.out_channels, 3, padding=1)),
        )
        for module in self.modules():
            if isinstance(module, Stage):
                module.activation_checkpointing = config.activation_checkpointing

    def forward(
        self, x: Tensor, t: Projectable, context: Projectable | None, residuals: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Predict from a noisy latent or image: (B, out_channels, h, w) in the dtype of the computation.

        Args:
            x: (B, in_channels, h, w), for Paint by Example `[x_t, z_masked, keep_mask]`; h and w can be halved evenly.
            t, context: (B,) timesteps in [0, T) and (B, L, D) tokens; or each layer's `project` of them. Without
                `context_dim`, context is (B,) labels for `num_classes` (-1: none), else None.
            residuals: from `ControlNet`, added to the outputs of the input blocks and of the middle block, one each.
        """
        condition = self.condition(t, context)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, *condition)
            skips.append(x)
        x = self.middle_block(x, *condition)
        if residuals is not None:
            x = x + residuals[-1]
            skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), *condition)
        return self.out(x)

    def single_token_dead_parameters(self) -> list[nn.Parameter]:
        """List the parameters without effect when the context is one token: `attn2`'s norm, queries and keys.

        They stay in the file format. An optimizer should not hold them, and DDP must not wait for their gradients.
        """
        suffixes = ("attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias")
        return [p for name, p in self.named_parameters() if "transformer_blocks" in name and name.endswith(suffixes)]

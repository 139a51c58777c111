"""The same work by this project and by diffusers' modules with the same weights, which `speed.py` and `gpu.py` time.

Dimensions: B batch · S side in pixels · E side of the exemplar · h, w latent cells · Z latent channels · C input
channels of the UNet · D token channels.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import samplers
from ldm.checkpoint.convert import diffusers_configs, to_diffusers
from ldm.checkpoint.keys import to_file_keys
from ldm.config import ModelConfig
from ldm.diffusion import draw_noise
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.layers import Uninitialised

GUIDANCE_SCALE = 5.0
SEED = 5  # of the posterior's noise in an edit


@dataclass(frozen=True)
class Inputs:
    """Random inputs of the networks, in the type of their weights."""

    image: Tensor  # (B, 3, S, S) in [-1, 1]
    keep_mask: Tensor  # (B, 1, S, S), 1 = keep; the hole is aligned with latent cells
    exemplar: Tensor  # (B, 3, E, E)
    channels: Tensor  # (B, C, h, w)
    z: Tensor  # (B, Z, h, w)
    eps: Tensor  # (B, Z, h, w) standard normal
    t: Tensor  # (B,) timesteps
    context: Tensor  # (B, 1, D)


def make_inputs(config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Draw inputs of the config's size, the same at each call; on the meta device they have shapes alone."""
    on_cpu = device.type != "meta"
    source = partial(torch.randn, generator=torch.Generator().manual_seed(0) if on_cpu else None)
    B, S, E, Z = batch_size, config.image_size, config.exemplar_encoder.image_size, config.first_stage.embed_dim
    side = S // 2 ** (len(config.first_stage.ch_mult) - 1)
    shapes = {
        "image": (B, 3, S, S),
        "exemplar": (B, 3, E, E),
        "channels": (B, config.unet.in_channels, side, side),
        "z": (B, Z, side, side),
        "eps": (B, Z, side, side),
        "context": (B, 1, config.unet.context_dim),
    }
    drawn = {name: source(shape, device="cpu" if on_cpu else "meta") for name, shape in shapes.items()}
    drawn["image"] = drawn["image"].tanh()
    drawn = {name: x.to(device, dtype) for name, x in drawn.items()}
    keep_mask = torch.ones(B, 1, S, S, device=device, dtype=dtype)
    keep_mask[..., S // 4 : S // 2, S // 4 : -S // 4] = 0
    t = torch.linspace(0, config.schedule.num_timesteps - 1, B + 1, device=device)[1:].long()
    return Inputs(keep_mask=keep_mask, t=t, **drawn)


def randomise(model: nn.Module) -> None:
    """Draw all weights so that signals keep their size: also those that training starts from zero."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            nn.init.uniform_(p, -1, 1).data.mul_(0.8 * math.sqrt(3 / p[0].numel()))
        else:
            middle = float(name.endswith(".weight"))  # of a norm; otherwise a bias
            nn.init.uniform_(p, middle - 0.1, middle + 0.1)


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> LatentDiffusion:
    """Build a model with random weights, for inference."""
    with device, Uninitialised():
        model = LatentDiffusion(config).requires_grad_(False).eval()
    randomise(model)
    return model.to(device, dtype)  # the schedule's buffers are made on the CPU


class Side(Protocol):
    """What both can do."""

    @property
    def unet(self) -> nn.Module: ...
    @property
    def networks(self) -> tuple[nn.Module, nn.Module]: ...
    def step(self, inputs: Inputs) -> Tensor: ...
    def encode(self, inputs: Inputs) -> Tensor: ...
    def decode(self, inputs: Inputs) -> Tensor: ...
    def edit(self, inputs: Inputs, num_steps: int) -> Tensor: ...
    def loss(self, inputs: Inputs) -> Tensor: ...


class Ours:
    """This project's model."""

    def __init__(self, model: LatentDiffusion) -> None:
        self.model, self.unet = model, model.unet
        self.networks = model.unet, model.first_stage_model

    def step(self, inputs: Inputs) -> Tensor:
        """Run the UNet once: (B, Z, h, w)."""
        return self.unet(inputs.channels, inputs.t, inputs.context)

    def encode(self, inputs: Inputs) -> Tensor:
        """Encode the image as the posterior's means: (B, Z, h, w)."""
        return self.model.first_stage_model.encode(inputs.image).mean

    def decode(self, inputs: Inputs) -> Tensor:
        """Decode latents: (B, 3, S, S)."""
        return self.model.first_stage_model.decode(inputs.z)

    def edit(self, inputs: Inputs, num_steps: int) -> Tensor:
        """Encode, take steps of DPM-Solver++ with guidance, decode: (B, 3, S, S)."""
        model = self.model
        z_masked = model.encode_image(inputs.image * inputs.keep_mask, torch.Generator().manual_seed(SEED))
        context = model.encode_exemplar(inputs.exemplar)
        c_concat = model.c_concat(z_masked, inputs.keep_mask)
        options: dict[str, Any] = {"num_steps": num_steps, "guidance_scale": GUIDANCE_SCALE, "x_T": inputs.eps}
        return model.decode_latents(model.sample(c_concat, context, sampler="dpm_solver_pp", **options))

    def loss(self, inputs: Inputs) -> Tensor:
        """Compute the training loss of the UNet, from latents and tokens that are given."""
        z_masked, t, eps = inputs.channels[:, 4:8], inputs.t, inputs.eps
        return self.model.loss(inputs.z, z_masked, inputs.keep_mask, inputs.context, t, eps).mean()


class Theirs:
    """diffusers' UNet, autoencoder and schedulers in its default memory layout.

    Tensors that agree in layout are shared with our model, unless the UNet is to be trained. The exemplar's encoder is
    ours in either: CLIP and a few blocks on one token. Raises ImportError without diffusers.
    """

    def __init__(self, model: LatentDiffusion, *, trains: bool = False) -> None:
        # it loads its classes lazily, hidden from type checkers
        self._diffusers: Any = importlib.import_module("diffusers")
        components = to_diffusers(to_file_keys(model.state_dict()))
        self._configs = diffusers_configs(components, model.config)
        self.unet = self._network("UNet2DConditionModel", "unet", components["unet"], copy=trains)
        self._vae = self._network("AutoencoderKL", "vae", components["vae"], copy=False)
        self.networks = self.unet, self._vae
        self.unet.requires_grad_(trains).train(trains)
        self._noise, self._model = self._scheduler("DDPMScheduler"), model

    def _network(self, name: str, part: str, state: dict[str, Tensor], *, copy: bool) -> Any:
        with torch.device("meta"):
            network = getattr(self._diffusers, name).from_config(self._configs[f"{part}/config.json"])
        as_default = Tensor.clone if copy else Tensor.contiguous
        options = {"memory_format": torch.contiguous_format}
        network.load_state_dict({key: as_default(x, **options) for key, x in state.items()}, assign=True)
        return network.requires_grad_(False).eval()

    def step(self, inputs: Inputs) -> Tensor:
        return self.unet(inputs.channels, inputs.t, inputs.context, return_dict=False)[0]

    def encode(self, inputs: Inputs) -> Tensor:
        return self._vae.encode(inputs.image, return_dict=False)[0].mean

    def decode(self, inputs: Inputs) -> Tensor:
        return self._vae.decode(inputs.z, return_dict=False)[0]

    @torch.no_grad()
    def edit(self, inputs: Inputs, num_steps: int) -> Tensor:
        model, scheduler = self._model, self._scheduler("DPMSolverMultistepScheduler", final_sigmas_type="zero")
        ac = model.schedule.alphas_cumprod
        timesteps = samplers.choose_timesteps("dpm_solver_pp", len(ac), num_steps)  # none of its spacings is ours
        scheduler.set_timesteps(num_steps)
        scheduler.timesteps = torch.tensor(timesteps, device=inputs.z.device)
        scheduler.sigmas = torch.cat([((1 - ac[timesteps]) / ac[timesteps]).sqrt(), ac.new_zeros(1)]).float()
        masked = inputs.image * inputs.keep_mask
        posterior = self._vae.encode(masked, return_dict=False)[0]
        # its own `sample` draws other numbers in bfloat16
        noise = draw_noise(posterior.mean.shape, torch.Generator().manual_seed(SEED), device=inputs.z.device)
        z_masked = self._vae.config.scaling_factor * (posterior.mean + posterior.std * noise.to(posterior.mean.dtype))
        known = torch.cat([z_masked, F.interpolate(inputs.keep_mask, size=z_masked.shape[2:])], dim=1).repeat(
            2, 1, 1, 1
        )
        context = model.encode_exemplar(inputs.exemplar)
        context = torch.cat([model.null_context().expand_as(context), context])
        x = inputs.eps.float()
        for t in scheduler.timesteps:
            channels = torch.cat([x.repeat(2, 1, 1, 1).to(known.dtype), known], dim=1)
            eps_null, eps_cond = self.unet(channels, t, context, return_dict=False)[0].float().chunk(2)
            x = scheduler.step(eps_null + GUIDANCE_SCALE * (eps_cond - eps_null), t, x, return_dict=False)[0]
        return self._vae.decode((x / self._vae.config.scaling_factor).to(known.dtype), return_dict=False)[0]

    def loss(self, inputs: Inputs) -> Tensor:
        x_t = self._noise.add_noise(inputs.z, inputs.eps, inputs.t)
        keep_mask = F.interpolate(inputs.keep_mask, size=x_t.shape[2:])
        channels = torch.cat([x_t, inputs.channels[:, 4:8], keep_mask], dim=1)
        prediction = self.unet(channels, inputs.t, inputs.context, return_dict=False)[0]
        return F.mse_loss(prediction.float(), inputs.eps)

    def _scheduler(self, name: str, **options: Any) -> Any:
        return getattr(self._diffusers, name).from_config(self._configs["scheduler/scheduler_config.json"], **options)


class TrainingStep:
    """Forward pass, backward pass and AdamW of a side's UNet; its autocast is off where the type is float32."""

    def __init__(self, side: Side, inputs: Inputs, dtype: torch.dtype = torch.float32) -> None:
        self._side, self._inputs, self._dtype = side, inputs, dtype
        parameters = [p for p in side.unet.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def __call__(self) -> Tensor:
        """Take a step; return the loss from before it."""
        with torch.autocast(self._inputs.z.device.type, self._dtype, enabled=self._dtype != torch.float32):
            loss = self._side.loss(self._inputs)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()

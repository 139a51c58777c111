"""Compare this project's numbers with the published code's, and those with exact arithmetic.

    python benchmarks/parity.py [--full] [--markdown]

The reference's inputs and outputs are in `tests/golden/`: float32 on a CPU, with weights that are a function of their
names. This script also computes everything in float64. Its distance from the reference is the reference's own rounding
error; no float32 implementation can be expected to be much closer.

`--full` adds the networks at full size (half a minute, 4 GB of memory).
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoint.keys import to_file_keys
from ldm.config import ModelConfig
from ldm.latent_diffusion import LatentDiffusion, load_model
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.exemplar_encoder import ExemplarEncoder
from ldm.models.layers import Uninitialised
from ldm.models.unet import UNetModel
from ldm.samplers import sample

ROOT = Path(__file__).resolve().parent.parent


class Run(NamedTuple):
    """A sampling run of the reference."""

    name: str
    sampler: str
    eta: float
    guidance_scale: float
    num_steps: int


RUNS = (
    Run("ddim_eta0_scale1", "ddim", 0.0, 1.0, 10),
    Run("ddim_eta1_scale1", "ddim", 1.0, 1.0, 10),
    Run("plms_scale1", "plms", 0.0, 1.0, 10),
    Run("ddim_eta0_scale5", "ddim", 0.0, 5.0, 10),
    Run("ddim_eta1_scale5", "ddim", 1.0, 5.0, 10),
    Run("plms_scale5", "plms", 0.0, 5.0, 10),
    Run("plms_scale5_S7", "plms", 0.0, 5.0, 7),
    Run("ddim_eta0_scale5_S30", "ddim", 0.0, 5.0, 30),
    Run("ddim_eta0_scale5_S50", "ddim", 0.0, 5.0, 50),
    Run("plms_scale5_S50", "plms", 0.0, 5.0, 50),
)
ETA_SEED = 123  # of the noise that DDIM with eta 1 adds


class Trajectory(NamedTuple):
    """x after every step and the predicted x_0, (steps, B, Z, h, w) each."""

    x: Tensor
    x_0: Tensor


class _Recorder:
    """Keeps the results of a sampler's steps."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.x_0: list[Tensor] = []

    def __call__(self, step: int, num_steps: int, x_t: Tensor, x_0: Tensor) -> None:
        self.x.append(x_t)
        self.x_0.append(x_0)

    def trajectory(self) -> Trajectory:
        return Trajectory(torch.stack(self.x), torch.stack(self.x_0))


def trajectory(model: LatentDiffusion, golden: dict[str, Tensor], run: Run) -> Trajectory:
    """Repeat a run of the reference with the model's own `sample`."""
    record = _Recorder()
    model.sample(
        model.c_concat(golden["sample/z_inpaint"], golden["sample/mask"]),
        golden["sample/cond"],
        sampler=run.sampler,
        num_steps=run.num_steps,
        guidance_scale=run.guidance_scale,
        eta=run.eta,
        x_T=golden["sample/x_T"],
        generator=torch.Generator().manual_seed(ETA_SEED),
        on_step=record,
    )
    return record.trajectory()


def expected_trajectory(golden: dict[str, Tensor], run: Run) -> Trajectory:
    """Return the reference's results, without x_T, which it also records."""
    return Trajectory(golden[f"sample/{run.name}/x_inter"][1:], golden[f"sample/{run.name}/pred_x0"][1:])


@torch.no_grad()
def exact_trajectory(model: LatentDiffusion, golden: dict[str, Tensor], run: Run) -> Trajectory:
    """Repeat the run in float64 with a float64 model; `LatentDiffusion.sample` would round to float32."""
    x_T, z_masked, mask, cond, null = (
        golden[f"sample/{name}"].double() for name in ("x_T", "z_inpaint", "mask", "cond", "uncond")
    )
    noises = iter(golden["sample/eta1_noise_seed123"].double())
    record = _Recorder()

    def eps_fn(x_t: Tensor, t: int) -> Tensor:
        channels, steps = torch.cat([x_t, z_masked, mask], dim=1), torch.full((len(x_t),), t)
        eps = model.unet(channels, steps, cond)
        if run.guidance_scale == 1:
            return eps
        eps_null = model.unet(channels, steps, null)
        return eps_null + run.guidance_scale * (eps - eps_null)

    sample(
        run.sampler,
        eps_fn,
        x_T,
        model.schedule.alphas_cumprod,
        run.num_steps,
        eta=run.eta,
        noise=lambda: next(noises),
        on_step=record,
    )
    return record.trajectory()


class Comparison(NamedTuple):
    """One quantity, computed in three ways; `exact` is None where float64 would take too long."""

    quantity: str
    ours: Tensor
    reference: Tensor
    exact: Tensor | None


@torch.no_grad()
def networks(model: LatentDiffusion, golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the networks' outputs in the model's own type, by their names in the golden data."""
    dtype = model.weight_dtype
    x, context, context3 = (golden[f"unet/{name}"].to(dtype) for name in ("x", "context", "context3"))
    image, z, exemplar = (golden[name].to(dtype) for name in ("vae/img", "vae/z", "exemplar/ref"))
    posterior = model.first_stage_model.encode(image)
    return {
        "unet/out": model.unet(x, golden["unet/t"], context),
        "unet/out_context3": model.unet(x, golden["unet/t"], context3),
        "vae/moments": torch.cat([posterior.mean, posterior.logvar], dim=1),
        "vae/decoded": model.first_stage_model.decode(z),
        **_exemplar_stages(model.cond_stage_model, model.proj_out, exemplar),
    }


def loss_and_gradients(model: LatentDiffusion, golden: dict[str, Tensor], branch: str) -> dict[str, Tensor]:
    """Return the loss of the conditional (`cond`) or unconditional (`uncond`) branch and its gradients by parameter."""
    z_0, z_masked, keep_mask = golden["loss/x_start9"].split([4, 4, 1], dim=1)
    context = (
        model.encode_exemplar(golden["exemplar/ref"]) if branch == "cond" else model.null_context().expand(2, -1, -1)
    )
    model.zero_grad(set_to_none=True)
    loss = model.loss(z_0, z_masked, keep_mask, context, golden["loss/t"], golden["loss/noise"]).mean()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare_tiny() -> Iterator[Comparison]:
    """Compare networks, loss and trajectories of the tiny model."""
    from tests.procweights import read_golden, write_tiny_model

    golden = read_golden("tiny_golden")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_tiny_model(Path(folder) / "model.safetensors")
        model = load_model(ROOT / "configs" / "tiny.yaml", checkpoint)
    exact_model = copy.deepcopy(model).double()
    exact = networks(exact_model, golden)
    for name, ours in networks(model, golden).items():
        yield Comparison(name, ours, golden[name], exact[name])
    model.requires_grad_(True)
    for branch in ("cond", "uncond"):
        ours = loss_and_gradients(model, golden, branch)
        prefix = f"loss/{branch}/grad/"
        names = [name.removeprefix(prefix) for name in golden if name.startswith(prefix)]
        yield Comparison(f"loss ({branch})", ours["loss"], golden[f"loss/{branch}/loss"], None)
        gradients = [ours[name].flatten() for name in names]
        reference = torch.cat([golden[prefix + name].flatten() for name in names])
        yield Comparison(f"gradients ({branch})", torch.cat(gradients), reference, None)
    model.requires_grad_(False)
    for run in RUNS:
        sampled = trajectory(model, golden, run), expected_trajectory(golden, run)
        exactly = exact_trajectory(exact_model, golden, run)
        yield Comparison(f"{run.name}: result", *(way.x[-1] for way in (*sampled, exactly)))
        yield Comparison(f"{run.name}: every x_t", *(way.x for way in (*sampled, exactly)))
        yield Comparison(f"{run.name}: every x_0", *(way.x_0 for way in (*sampled, exactly)))


FULL_PARTS = ("unet", "vae", "exemplar")


@torch.no_grad()
def compare_full(part: str) -> Iterator[Comparison]:
    """Compare one network of the full-size model; one at a time, the largest needs 3.4 GB."""
    from tests.procweights import normal, read_golden

    golden, config = read_golden("full_golden"), ModelConfig()
    if part == "unet":
        with Uninitialised():
            unet = UNetModel(config.unet)
        _fill(unet, "model.diffusion_model.")
        ours = {"unet/out": unet(*(golden[f"unet/{name}"] for name in ("x", "t", "context")))}
    elif part == "vae":
        with Uninitialised():
            first_stage = AutoencoderKL(config.first_stage)
        _fill(first_stage, "first_stage_model.")
        posterior = first_stage.encode(golden["vae/img"])
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
        ours = {"vae/moments": moments, "vae/decoded": first_stage.decode(golden["vae/z"])}
    else:
        with Uninitialised():
            encoder = ExemplarEncoder(config.exemplar_encoder)
            proj_out = nn.Linear(config.exemplar_encoder.hidden_size, config.unet.context_dim)
        _fill(encoder, "cond_stage_model.")
        _fill(proj_out, "proj_out.")
        ours = _exemplar_stages(encoder, proj_out, normal("full/exemplar/ref", (1, 3, 224, 224)))
        del ours["exemplar/clip_last_hidden"]  # not recorded at this size
    for name, got in ours.items():
        yield Comparison(f"full size: {name}", got, golden[name], None)


def _fill(network: nn.Module, prefix: str) -> None:
    """Give a network on the meta device the weights of its names in a checkpoint."""
    from tests.procweights import weight

    names = {name: next(iter(to_file_keys({prefix + name: tensor}))) for name, tensor in network.state_dict().items()}
    state = {name: weight(names[name], tensor.shape) for name, tensor in tqdm(network.state_dict().items(), delay=3)}
    network.load_state_dict(state, assign=True)
    network.requires_grad_(False).eval()


def _exemplar_stages(encoder: ExemplarEncoder, proj_out: nn.Module, pixel_values: Tensor) -> dict[str, Tensor]:
    hidden: list[Tensor] = []
    hook = encoder.transformer.encoder.layers.register_forward_hook(lambda *args: hidden.append(args[-1]))
    pooled = encoder.features(pixel_values)
    hook.remove()
    mapped = encoder.mapper(pooled)
    normed = encoder.final_ln(mapped)
    return {
        "exemplar/clip_last_hidden": hidden[0],
        "exemplar/clip_pooled": pooled[:, 0],
        "exemplar/mapper": mapped,
        "exemplar/final_ln": normed,
        "exemplar/proj_out": proj_out(normed),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="add the full-size networks")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args(argv)
    sys.path.append(str(ROOT))  # for tests.procweights; Python adds only the script's own folder
    titles = ["quantity", "largest value", "ours - reference", "reference - exact", "ours - exact"]
    rows: list[list[str]] = []
    comparisons = [compare_tiny(), *(compare_full(part) for part in FULL_PARTS if args.full)]
    for name, ours, reference, exact in tqdm(chain.from_iterable(comparisons), delay=3, leave=False):
        distances = [_distance(ours, reference)]
        if exact is not None:
            distances += [_distance(reference, exact), _distance(ours, exact)]
        rows.append([name, f"{reference.abs().max():.3g}", *(f"{distance:.1e}" for distance in distances)])
    table = Table(*titles, box=box.MARKDOWN if args.markdown else box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    return 0


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference."""
    return (a.double() - b.double()).abs().max().item()


if __name__ == "__main__":
    raise SystemExit(main())

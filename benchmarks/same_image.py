"""Compare an edit of a full-size checkpoint with that of diffusers after scripts/convert_checkpoint.py.

    python benchmarks/same_image.py FOLDER [--steps 5] [--side 256]

Writes the published model with weights that are a function of their names (5.2 GB) to FOLDER, converts it (another 5.2
GB), edits with both from the same noise, and prints the largest difference. Removes both at the end.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.io import write_safetensors
from ldm.checkpoint.keys import SCHEDULE_BUFFERS
from ldm.config import Config
from ldm.latent_diffusion import load_model

ROOT = Path(__file__).parent.parent


def published_layout() -> dict[str, Tensor]:
    """Return the published names and shapes as meta tensors, without those that follow from the config."""
    from tests.procweights import layout

    left_out = (*SCHEDULE_BUFFERS, "cond_stage_model.transformer.vision_model.embeddings.position_ids")
    return {name: tensor for name, tensor in layout("official").items() if name not in left_out}


def theirs(folder: Path, inputs: dict[str, Tensor], steps: int) -> Tensor:
    """Edit with diffusers' pipeline: (1, H, W, 3) in [0, 1]."""
    diffusers: Any = importlib.import_module("diffusers")  # it loads its classes lazily, hidden from type checkers
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
    from transformers import CLIPImageProcessor

    parts: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        "image_encoder": PaintByExampleImageEncoder.from_pretrained(folder / "image_encoder"),
        "scheduler": diffusers.DDIMScheduler.from_pretrained(folder / "scheduler"),
        "feature_extractor": CLIPImageProcessor.from_pretrained(folder / "feature_extractor"),
        "safety_checker": None,
    }
    pipeline: Any = diffusers.PaintByExamplePipeline(**parts, requires_safety_checker=False)
    images = pipeline(
        image=inputs["image"],
        mask_image=inputs["hole"],
        example_image=inputs["exemplar"],
        latents=inputs["x_T"].clone(),
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    return torch.from_numpy(images)


@torch.no_grad()
def ours(checkpoint: Path, inputs: dict[str, Tensor], steps: int) -> Tensor:
    """Edit with this project: (1, H, W, 3) in [0, 1]."""
    model = load_model(Config(), checkpoint)
    keep = 1 - inputs["hole"]
    z_masked = model.encode_image(inputs["image"] * keep, torch.Generator().manual_seed(5))
    context = model.encode_exemplar(inputs["exemplar"])
    z = model.sample(model.c_concat(z_masked, keep), context, sampler="ddim", num_steps=steps, x_T=inputs["x_T"])
    return (model.decode_latents(z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--side", type=int, default=256, help="pixels")
    args = parser.parse_args()
    sys.path.append(str(ROOT))  # for tests.procweights; Python adds only the script's own folder
    from tests.procweights import weight

    args.folder.mkdir(parents=True)
    try:
        checkpoint, folder = args.folder / "model.safetensors", args.folder / "diffusers"
        layout = published_layout()
        pieces = ((name, weight(name, tensor.shape)) for name, tensor in layout.items())
        write_safetensors(checkpoint, layout, pieces=pieces)
        script = ROOT / "scripts" / "convert_checkpoint.py"
        subprocess.run([sys.executable, script, checkpoint, folder, "--to", "diffusers"], check=True)
        torch.manual_seed(0)
        side = args.side
        inputs = {
            "image": torch.rand(1, 3, side, side) * 2 - 1,
            "hole": torch.zeros(1, 1, side, side),
            "exemplar": torch.randn(1, 3, 224, 224),
            "x_T": torch.randn(1, 4, side // 8, side // 8),
        }
        inputs["hole"][..., side // 4 : side // 2, side // 4 : -side // 4] = 1  # aligned with latent cells
        images = theirs(folder, inputs, args.steps), ours(checkpoint, inputs, args.steps)
        difference = (images[0] - images[1]).abs()
        print(f"{args.steps} steps, {side} px: largest difference {difference.max():.1e}, mean {difference.mean():.1e}")
        print(f"of values in [0, 1] with standard deviation {images[1].std():.2f}")
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()

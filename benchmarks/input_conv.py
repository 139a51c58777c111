"""Measure how much of inpainting the input convolution alone learns: a small version of docs/text.md.

    python benchmarks/input_conv.py --out /tmp/input-conv

The data are coloured shapes on blurred colours, 64 px, encoded by the bundled model's first stage. A text-to-image
model, which reads x_t alone, is trained on them, inflated, and fine-tuned for equally many steps with each value of
`training.trainable`. The table lists the prediction errors on validation images, with equal noise, in and outside the
hole.
"""

from __future__ import annotations

import argparse
import json
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from ldm.checkpoint.io import read_checkpoint, write_safetensors
from ldm.checkpoint.keys import FIRST_STAGE, to_file_keys
from ldm.checkpoint.merge import inflate_input_conv
from ldm.config import Config, load_config
from ldm.data.annotations import OPEN_IMAGES_CSV
from ldm.data.datamodule import DataModule
from ldm.diffusion import q_sample, target
from ldm.editing.editor import BUNDLED_MODEL
from ldm.latent_diffusion import latent_hole, load_weights
from ldm.training.diffusion_module import DiffusionTraining
from scripts import read_bbox
from scripts.pipeline import ROOT

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("disc", "square", "cross")
WAYS = ("input_conv", "input_conv_attention", "all")
CHANNELS = ["x_t", "hole_mask", "z_masked"]


def make_pictures(root: Path) -> None:
    """Write images with a shape each, its box and its class name, in Open Images' layout."""
    rng, names = np.random.default_rng(0), [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 600), ("validation", 128)):
        (root / "images" / split).mkdir(parents=True)
        rows = ["ImageID,LabelName,XMin,XMax,YMin,YMax"]
        for i in range(count):
            picture = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((64, 64))
            k, side = int(rng.integers(len(names))), int(rng.integers(18, 30))
            x, y = (int(v) for v in rng.integers(4, 60 - side, 2))
            colour, shape = names[k].split()
            draw, box = ImageDraw.Draw(picture), (x, y, x + side, y + side)
            if shape == "cross":
                draw.line(box, colour, 8)
                draw.line((x, y + side, x + side, y), colour, 8)
            else:
                (draw.ellipse if shape == "disc" else draw.rectangle)(box, colour)
            picture.save(root / "images" / split / f"{i:04d}.jpg", quality=95)
            rows.append(f"{i:04d},{k},{x / 64},{(x + side) / 64},{y / 64},{(y + side) / 64}")
        (root / "annotations" / OPEN_IMAGES_CSV[split]).write_text("\n".join(rows))
    described = "\n".join(f"{k},{name}" for k, name in enumerate(names))
    (root / "annotations" / "class-descriptions.csv").write_text(described)
    read_bbox.main(["--root", str(root)])


def make_start(out: Path, base: Config) -> None:
    """Write a tokenizer of letters, and a checkpoint with random weights and the bundled first stage."""
    (out / "tokenizer").mkdir()
    words = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (out / "tokenizer" / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (out / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    state = to_file_keys(DiffusionTraining(base).state_dict())
    bundled = read_checkpoint(BUNDLED_MODEL / "model.safetensors")
    state |= {name: tensor.float() for name, tensor in bundled.items() if name.startswith(FIRST_STAGE)}
    write_safetensors(out / "start.safetensors", state)


def settings(out: Path, batch_size: int) -> dict[str, object]:
    """Return the config of the text-to-image model."""
    mini = load_config(BUNDLED_MODEL / "config.yaml").model
    model = OmegaConf.to_container(OmegaConf.structured(mini))
    assert isinstance(model, dict)
    unet = {"in_channels": 8, "model_channels": 48, "context_dim": 64, "num_heads": 4}
    text = {"vocab_size": 54, "max_length": 16, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2}
    model |= {
        "condition": "text",
        "input_channels": ["x_t"],
        "unet": {**model["unet"], **unet},
        "text_encoder": {**model["text_encoder"], **text, "num_heads": 4, "tokenizer": str(out / "tokenizer")},
    }
    data = {"root": str(out / "pictures"), "captions": "classes", "batch_size": batch_size, "val_batch_size": 32}
    return {
        "model": model,
        "data": {**data, "num_workers": 0, "augment_exemplar": False},
        "training": {"lr_schedule": "cosine", "warmup_steps": 50, "p_uncond": 0.1, "base_lr": 1e-3},
        "logging": {"loggers": ["csv"], "image_every": 0, "checkpoint_every": 0},
        "trainer": {"accelerator": "auto", "devices": 1, "num_sanity_val_steps": 0, "enable_progress_bar": False},
    }


@torch.no_grad()
def errors(config: Config, checkpoint: Path) -> tuple[float, float]:
    """Return mean squared errors in and outside the hole, over four draws of noise for each validation image."""
    module = DiffusionTraining(config).eval()
    load_weights(module, read_checkpoint(checkpoint), str(checkpoint), dtype=torch.float32)
    alphas_cumprod, sums = module.ac, np.zeros(4)
    for batch in DataModule(config).val_dataloader():
        context = module.context(None, batch["caption"])
        for draw in range(4):
            generators = [torch.Generator().manual_seed(key + draw) for key in batch["key"].tolist()]
            z_0, z_masked = module.latents(batch, module.posterior_noise(generators))
            t = torch.stack([torch.randint(1000, (), generator=g) for g in generators])
            eps = torch.stack([torch.randn(z_0.shape[1:], generator=g) for g in generators])
            x = module.unet_input(q_sample(z_0, t, eps, alphas_cumprod), z_masked, batch["keep_mask"])
            expected = target(z_0, eps, t, module.config.parameterization, alphas_cumprod)
            error = (module.unet(x, t, context) - expected).square()
            hole = latent_hole(batch["keep_mask"], z_0).expand_as(error)
            sums += [float(part.sum()) for part in (error * hole, hole, error * (1 - hole), 1 - hole)]
    return sums[0] / sums[1], sums[2] / sums[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for images and runs")
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=150, help="fine-tuning steps of each run; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True)
    make_pictures(out / "pictures")
    before = out / "text-to-image.yaml"
    before.write_text(OmegaConf.to_yaml(OmegaConf.create(settings(out, args.batch_size))))
    make_start(out, load_config(before))

    def run(name: str, config: Path, start: Path, *overrides: str) -> Path:
        words = ["-b", str(config), "-l", str(out / name), "--pretrained-model", str(start), *overrides]
        subprocess.run([sys.executable, str(ROOT / "main.py"), *words], check=True)
        return next((out / name).iterdir()) / "checkpoints" / "last.ckpt"

    base = run("base", before, out / "start.safetensors", f"trainer.max_steps={args.base_steps}")
    inflated, after = out / "inflated.safetensors", out / "inpainting.yaml"
    write_safetensors(inflated, inflate_input_conv(to_file_keys(read_checkpoint(base)), 17))
    change = {"model": {"input_channels": CHANNELS, "unet": {"in_channels": 17}}}
    after.write_text(OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.load(before), change)))
    rows = {"nothing": inflated}
    for way in WAYS:
        overrides = (f"training.trainable={way}", f"trainer.max_steps={args.steps}")
        rows[way] = run(way, after, inflated, *overrides)
    table = Table("fine-tuned", "error in the hole", "outside")
    for name, checkpoint in rows.items():
        inside, outside = errors(load_config(after), checkpoint)
        table.add_row(name, f"{inside:.4f}", f"{outside:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()

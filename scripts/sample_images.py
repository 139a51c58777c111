#!/usr/bin/env python
"""Sample a pixel diffusion model: a grid, and a batch in the format of guided-diffusion's evaluation.

    python scripts/sample_images.py                                       # the bundled model of 32 px emoji
    python scripts/sample_images.py 256x256_diffusion_uncond.pt --num 16
    python scripts/sample_images.py 64x64_diffusion.pt --classifier 64x64_classifier.pt --num 50000 --npz
    torchrun --nproc-per-node 8 scripts/sample_images.py …                # each process takes its share

Writes OUTDIR/grid.png, OUTDIR/parts/ and, with --npz, OUTDIR/samples_NxHxWxC.npz with `arr_0` (N, H, W, C) uint8 and
for models of classes `arr_1`, the labels. Image i depends on --seed and i alone; run the same command again to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing it

from ldm.files import UserError, atomic_write, check_writable, read_json, write_json

if TYPE_CHECKING:
    import numpy as np

GRID = 64  # images of the grid at most
BUNDLED = Path(__file__).resolve().parents[1] / "pretrained_models" / "emoji-32" / "model.safetensors"
BUNDLED_SETTINGS = {"sampler": "dpm_solver_pp", "timesteps": "20", "guidance_scale": 3.0}


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    checkpoint = "of this project, or of improved-diffusion or guided-diffusion; default: the bundled one"
    add("checkpoint", type=Path, nargs="?", help=checkpoint)
    add("--config", type=Path, metavar="YAML", help="of the checkpoint; default: config.yaml beside it, if any")
    add("--outdir", type=Path, default=Path("results/samples"), help="default: %(default)s")
    add("--num", type=int, default=GRID, metavar="N", help="images; default: %(default)s")
    add("--npz", action="store_true", help="write one batch of all images, too")
    classes = "labels, or names that classes.json beside the checkpoint holds, in turn; default: drawn at random"
    add("--classes", nargs="+", metavar="CLASS", help=classes)
    add("--low-res", type=Path, metavar="NPZ", help="batch that an upsampler enlarges, with its labels")
    add("--sampler", default="ddpm", help="ddpm, ddim, plms, dpm_solver_pp, unipc or heun; default: %(default)s")
    steps = "a number, or for ddpm and ddim as guided-diffusion: ddim25, 10,10,10; default: %(default)s"
    add("--timesteps", default="250", metavar="STEPS", help=steps)
    add("--eta", type=float, default=0.0, help="share of DDPM's noise that ddim adds; default: %(default)s")
    add("--guidance-scale", type=float, default=1.0, metavar="S", help="without a classifier; default: 1, off")
    add("--guidance-rescale", type=float, default=0.0, metavar="SHARE", help="Lin et al. 2024; default: 0")
    add("--guidance-parallel", type=float, default=1.0, metavar="SHARE", help="APG keeps 0; default: 1")
    add("--cfg-plus-plus", action="store_true", help="CFG++, with ddim")
    add("--classifier", type=Path, metavar="FILE", help="guide by this classifier of noisy images")
    add("--classifier-config", type=Path, metavar="YAML", help="default: config beside it, if any")
    add("--classifier-scale", type=float, default=1.0, metavar="S", help="default: 1")
    add("--no-clip", action="store_true", help="do not keep predicted images in [-1, 1]")
    add("--batch-size", type=int, default=16, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        names = read_json(BUNDLED.parent / "classes.json", [])
        parser.set_defaults(checkpoint=BUNDLED, classes=names, **BUNDLED_SETTINGS)
        args = parser.parse_args(argv)
    try:
        sample(args)
    except (ValueError, OSError) as error:  # including UserError
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def sample(args: argparse.Namespace) -> None:
    """Sample this process's share, then, in the first process, wait for the others and join the parts."""
    import torch
    from tqdm import tqdm

    from ldm.diffusion import draw_noise
    from ldm.editing.editor import pick_device
    from ldm.pixel_diffusion import Classifier, Guidance, PixelDiffusion, load_pixel_model

    device, rank = pick_device(args.device), int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.num < 1 or args.batch_size < 1:
        raise UserError(f"got --num {args.num} and --batch-size {args.batch_size}, expected at least 1 of each")
    model = load_pixel_model(args.checkpoint, config_of(args.checkpoint, args.config), device=device)
    if not isinstance(model, PixelDiffusion):
        raise UserError(f"{args.checkpoint}: a classifier; pass it as --classifier, beside a diffusion model")
    classifier = None
    if args.classifier:
        loaded = load_pixel_model(args.classifier, config_of(args.classifier, args.classifier_config), device=device)
        if not isinstance(loaded, Classifier):
            raise UserError(f"{args.classifier}: a diffusion model, not a classifier")
        classifier = loaded
    model.chain(args.sampler, args.timesteps)  # raises where they are not there
    guidance = Guidance(
        args.guidance_scale,
        args.guidance_rescale,
        args.guidance_parallel,
        args.cfg_plus_plus,
        classifier,
        args.classifier_scale,
    )
    known = classifier.config.classifier.num_classes if classifier else model.config.unet.num_classes
    low_res, classes = read_low_res(args, model.config.small_size)
    labels = choose_labels(args, known, classes)
    parts = args.outdir / "parts"
    check_writable(parts)
    keep_settings(args, parts)
    starts = range(0, args.num, args.batch_size)
    shape = model.channels, model.config.image_size, model.config.image_size
    for start in tqdm(starts[rank::world_size], desc="sampling", unit="batch", disable=rank > 0):
        path, stop = parts / f"{start:08d}.npz", min(start + args.batch_size, args.num)
        if path.is_file():
            continue
        generators = [torch.Generator().manual_seed(args.seed * 2**32 + i) for i in range(start, stop)]
        x_T = draw_noise((stop - start, *shape), generators, device=device)
        y = torch.tensor(labels[start:stop], device=device) if labels else None
        small = None
        if low_res is not None:
            small = torch.from_numpy(low_res[start:stop]).to(device).permute(0, 3, 1, 2) / 127.5 - 1
        options: dict[str, Any] = {"sampler": args.sampler, "steps": args.timesteps, "eta": args.eta}
        x = model.sample(x_T, y, small, guidance=guidance, clip=not args.no_clip, generator=generators, **options)
        levels = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # rounded down
        write_npz(path, {"arr_0": levels} | ({"arr_1": y.cpu().numpy()} if y is not None else {}))
    if rank == 0:
        paths = [parts / f"{start:08d}.npz" for start in starts]
        while not all(path.is_file() for path in paths):
            time.sleep(1)
        write_results(args, paths)


def config_of(checkpoint: Path, config: Path | None) -> Path | None:
    """Return the config given or the one beside a checkpoint: NAME.yaml or config.yaml."""
    folder = checkpoint.resolve().parent
    beside = (checkpoint.with_suffix(".yaml"), folder / "config.yaml", folder.parent / "config.yaml")  # of a run
    return config or next((path for path in beside if path.is_file()), None)


def choose_labels(args: argparse.Namespace, num_classes: int | None, classes: np.ndarray | None) -> list[int]:
    """Return a label for each image, by default that of its small version; none for a model without classes."""
    import numpy as np

    if num_classes is None:
        if args.classes:
            raise UserError("--classes: the model has none, and no --classifier is given")
        return []
    if not args.classes and classes is not None:
        return classes[: args.num].tolist()
    if not args.classes:
        return np.random.default_rng(args.seed).integers(num_classes, size=args.num).tolist()
    names = read_json(args.checkpoint.parent / "classes.json", [])
    labels = [names.index(word) if word in names else int(word) if word.isdecimal() else -1 for word in args.classes]
    for word, label in zip(args.classes, labels, strict=True):
        if not 0 <= label < num_classes:
            listed = f", or one of {', '.join(names)}" if names else ""
            raise UserError(f"--classes: got {word}, expected a number from 0 to {num_classes - 1}{listed}")
    return [labels[i % len(labels)] for i in range(args.num)]


def read_low_res(
    args: argparse.Namespace, small_size: int | None
) -> tuple[np.ndarray, np.ndarray | None] | tuple[None, None]:
    """Return the images that an upsampler enlarges, (N, h, w, C) uint8, and their labels (N,), if they are there."""
    import numpy as np

    from ldm.data.image_folder import read_batch

    if small_size is None:
        return None, None
    if args.low_res is None:
        raise UserError(f"--low-res: the model enlarges images of {small_size} px; pass a batch of them, arr_0 in .npz")
    images, labels = read_batch(args.low_res)
    if images.dtype != np.uint8 or images.shape[1:3] != (small_size, small_size) or len(images) < args.num:
        expected = f"at least {args.num} of {small_size} x {small_size} pixels in uint8"
        raise UserError(f"{args.low_res}: got {images.shape} in {images.dtype}, expected {expected}")
    return images, labels


def keep_settings(args: argparse.Namespace, parts: Path) -> None:
    """Refuse to go on with other settings than those of the parts that are there."""
    free = ("npz", "num", "outdir", "device")  # what may change from one call to the next
    settings = json.loads(json.dumps({k: v for k, v in vars(args).items() if k not in free}, default=str))
    path = parts / "settings.json"
    if read_json(path, settings) != settings:
        raise UserError(f"{parts}: holds samples of other settings ({path}); choose another --outdir")
    write_json(path, settings)


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an `.npz` atomically."""
    import numpy as np

    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def write_results(args: argparse.Namespace, paths: Sequence[Path]) -> None:
    """Join the parts: the grid, and the batch array by array."""
    import numpy as np
    from PIL import Image

    from ldm.images import save_png

    def read(name: str) -> np.ndarray:
        return np.concatenate([np.load(path)[name] for path in paths])

    images = [image for path in paths[: -(-GRID // args.batch_size)] for image in np.load(path)["arr_0"]][:GRID]
    columns = max(1, round(len(images) ** 0.5))
    rows = -(-len(images) // columns)
    side, channels = images[0].shape[0], images[0].shape[2]
    grid = np.zeros((rows * side, columns * side, channels), np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * side, i % columns * side
        grid[top : top + side, left : left + side] = image
    save_png(Image.fromarray(grid.squeeze()), args.outdir / "grid.png")
    print(args.outdir / "grid.png")
    if args.npz:
        arrays = {name: read(name) for name in np.load(paths[0]).files}
        path = args.outdir / f"samples_{'x'.join(map(str, arrays['arr_0'].shape))}.npz"
        write_npz(path, arrays)
        print(path)


if __name__ == "__main__":
    raise SystemExit(main())

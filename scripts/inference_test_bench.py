"""Edit every item of a benchmark: BENCH -> OUTDIR/results/ID.png.

    python scripts/inference_test_bench.py dataset/mini/bench --outdir results/bench
    python scripts/inference_test_bench.py dataset/mini/bench --outdir results/bench-null --exemplar null

A run that was stopped goes on where it stopped: finished pictures are skipped, and are the same as in
one go, since each item has its own seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("bench", type=Path, metavar="BENCH", help="folder in the layout of COCOEE")
    parser.add_argument("--outdir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--checkpoint", "--ckpt", type=Path, metavar="FILE", help="default: the bundled model")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: config.yaml beside the checkpoint")
    parser.add_argument(
        "--exemplar",
        default="own",
        choices=("own", "other", "null"),
        help="what is painted: the item's exemplar, the next item's, or the null token (plain inpainting)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--sampler", default="dpm_solver_pp", help="default: %(default)s")
    parser.add_argument("--steps", "--ddim_steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--guidance-scale", "--scale", type=float, default=5.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="item k uses seed + k; default: %(default)s")
    parser.add_argument("--crop", action="store_true", help="crop around the hole instead of showing the whole scene")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Edit what is not there yet, batch by batch."""
    import torch
    from tqdm import tqdm

    from ldm.data.cocoee import Bench
    from ldm.editing import EditingError, Editor, fit_scene, save_png

    bench = Bench(args.bench)
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise EditingError("--batch-size and --limit: expected 1 or more")
    sampling: dict[str, Any] = {"sampler": args.sampler, "num_steps": args.steps, "guidance_scale": args.guidance_scale}
    settings: dict[str, Any] = sampling | {
        "exemplar": args.exemplar,
        "seed": args.seed,
        "crop": args.crop,
        "precision": args.precision,
        "checkpoint": str(args.checkpoint or "bundled"),
    }
    folder = args.outdir / "results"
    folder.mkdir(parents=True, exist_ok=True)
    check_same_run(args.outdir / "settings.json", settings)

    indices = range(min(args.limit or len(bench), len(bench)))
    todo = [k for k in indices if not (folder / f"{bench.ids[k]}.png").exists()]
    if len(todo) < len(indices):
        print(f"{len(indices) - len(todo)} of {len(indices)} are there already")
    if todo:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
        editor = Editor.from_pretrained(args.checkpoint, config=args.config, device=args.device, dtype=dtype)
        with tqdm(total=len(indices), initial=len(indices) - len(todo), unit="image") as bar:
            for start in range(0, len(todo), args.batch_size):
                batch = todo[start : start + args.batch_size]
                fitted, exemplars = [], []
                for k in batch:
                    item = bench[k]
                    scene = fit_scene(
                        item.scene, item.hole_mask, editor.model.config.image_size, whole_image=not args.crop
                    )
                    fitted.append(scene)
                    shown = bench[(k + 1) % len(bench)].exemplar if args.exemplar == "other" else item.exemplar
                    exemplars.append(editor.exemplar_tensor(shown))
                painted = editor.paint(
                    torch.cat([scene.image for scene in fitted]),
                    torch.cat([scene.keep_mask for scene in fitted]),
                    None if args.exemplar == "null" else torch.cat(exemplars),
                    [args.seed + k for k in batch],
                    **sampling,
                )
                for k, scene, pixels in zip(batch, fitted, painted, strict=True):
                    save_png(scene.put_back(pixels), folder / f"{bench.ids[k]}.png")
                bar.update(len(batch))
    print(f"{len(indices)} results in {folder}")


def check_same_run(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue a folder of results that was begun with other settings."""
    from ldm.editing import EditingError

    if path.exists():
        before = json.loads(path.read_text())
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            got = ", ".join(f"{key}: {before.get(key)} => {settings[key]}" for key in changed)
            raise EditingError(f"{path.parent}: holds results of other settings ({got}); choose another --outdir")
    else:
        path.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())

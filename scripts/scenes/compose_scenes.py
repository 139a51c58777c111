"""Compose training scenes from cut-outs and photographs; docs/compose.md says how to use your own."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout without installing it

from scripts.scenes.compose import ComposeError, SceneSettings, compose_dataset
from scripts.scenes.debian import MaterialError, fetch_material


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--from-debian",
        type=Path,
        metavar="DIR",
        help="fetch photographic material from Debian packages into DIR (no root needed)",
    )
    parser.add_argument(
        "--cutouts", type=Path, metavar="DIR", help="pictures with transparency (default: cutouts/ of --from-debian)"
    )
    parser.add_argument(
        "--backgrounds", type=Path, metavar="DIR", help="photographs (default: backgrounds/ of --from-debian)"
    )
    parser.add_argument(
        "--extra-cutouts",
        type=Path,
        metavar="DIR",
        help="cut-outs of any style that training scenes alone show (default: extras/ of --from-debian)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="dataset to write; without it, --from-debian only fetches"
    )
    parser.add_argument(
        "--count",
        type=int,
        default=12_000,
        help="training scenes; validation and test get 2 %% each on top, at least 8 (default: %(default)s)",
    )
    parser.add_argument("--size", type=int, default=64, help="side of a scene in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--bench",
        type=int,
        default=0,
        metavar="M",
        help="items of a COCOEE-layout bench of held-out objects (default: none)",
    )
    parser.add_argument("--bench-size", type=int, metavar="PX", help="side of the bench's scenes (default: --size)")
    parser.add_argument(
        "--hue-jitter",
        type=float,
        default=0.0,
        metavar="TURNS",
        help="recolour objects of train and validation by up to this shift, 0 to 0.5 (default: off)",
    )
    parser.add_argument(
        "--hue-jitter-share",
        type=float,
        default=0.5,
        metavar="P",
        help="how often an object is recoloured (default: %(default)s)",
    )
    parser.add_argument(
        "--extra-share",
        type=float,
        default=0.0,
        metavar="P",
        help="how often an object of a training scene is an extra cut-out (default: never)",
    )
    parser.add_argument(
        "--patch-share",
        type=float,
        default=0.0,
        metavar="P",
        help="how often an object of a training scene is a random piece of a photograph (default: never)",
    )
    parser.add_argument(
        "--objects",
        nargs="+",
        default=[],
        metavar="NAME",
        help="show these cut-outs alone, in every split (names relative to the cut-outs' folder)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes; the scenes do not depend on it (default: %(default)s)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset in --out that was made with other settings"
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")

    material: Path | None = arguments.from_debian
    cutouts: Path | None = arguments.cutouts or (material and material / "cutouts")
    backgrounds: Path | None = arguments.backgrounds or (material and material / "backgrounds")
    extras: Path | None = arguments.extra_cutouts or (material and material / "extras")
    if cutouts is None or backgrounds is None:
        parser.error("give --cutouts and --backgrounds, or --from-debian")
    if arguments.out is None and material is None:
        parser.error("give --out: where the dataset goes")
    try:
        settings = SceneSettings(
            count=arguments.count,
            size=arguments.size,
            seed=arguments.seed,
            bench=arguments.bench,
            bench_size=arguments.bench_size,
            hue_jitter=arguments.hue_jitter,
            hue_jitter_share=arguments.hue_jitter_share,
            extra_share=arguments.extra_share,
            patch_share=arguments.patch_share,
            objects=tuple(arguments.objects),
        )
        if material is not None:
            fetch_material(material)
            print(f"material in {material}; sources and licences in {material / 'LICENSES.md'}")
        if arguments.out is not None:
            compose_dataset(
                cutouts,
                backgrounds,
                arguments.out,
                settings,
                extras_dir=extras,
                workers=arguments.workers,
                overwrite=arguments.overwrite,
            )
            print(f"dataset in {arguments.out}; next: python scripts/read_bbox.py")
    except (ComposeError, MaterialError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

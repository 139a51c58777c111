#!/usr/bin/env python
"""Pack the material of scripts/scenes/compose.py into one small file, for a machine without a network.

    python scripts/scenes/compose.py --from-debian dataset/material
    python scripts/scenes/pack.py dataset/material dataset/material.tar.gz
    python scripts/scenes/compose.py --material dataset/material.tar.gz --out dataset/mini --size 128 …

Pictures are scaled down and stored as WebP. They keep their names, suffix included: names decide what is held out, and
this command checks that the packed pictures are divided in the same way. LICENSES.md goes along.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout without installing it

from ldm.files import UserError, atomic_write
from scripts.scenes.compose import SceneSettings, find_pictures

SIDES = {"cutouts": 160, "extras": 96, "backgrounds": 320}  # pixels: long side; of backgrounds the short side
QUALITY = {"cutouts": 85, "extras": 64, "backgrounds": 76}  # of WebP; artefacts are below the scenes' own resampling
LICENCES = "LICENSES.md"


def pack(material: Path, out: Path) -> dict[str, int]:
    """Write the pictures in `material` to a tar file and return the bytes of each folder.

    Raises:
        UserError: a folder is missing or unusable, or the packed pictures would be divided into training and held-out
            ones in another way than the originals.
    """
    sizes = dict.fromkeys(SIDES, 0)
    with atomic_write(out) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for kind in SIDES:
            for path in tqdm(sorted((material / kind).rglob("*")), desc=kind, unit=" files", leave=False):
                if path.is_file():
                    content = shrunk(path, kind)
                    sizes[kind] += len(content)
                    _add(archive, path.relative_to(material).as_posix(), content)
        if (material / LICENCES).is_file():
            _add(archive, LICENCES, (material / LICENCES).read_bytes())
        archive.close()
        with open_material(temporary) as packed:
            for kind, share in (("cutouts", SceneSettings.holdout), ("backgrounds", SceneSettings.background_holdout)):
                before, after = (find_pictures(root / kind, kind, share)[0] for root in (material, packed))
                if (before.train, before.held_out) != (after.train, after.held_out):
                    moved = sorted(set(before.held_out) ^ set(after.held_out))
                    raise UserError(f"{material / kind}: packed, these change sides: {', '.join(moved)}; remove them")
    return sizes


def shrunk(path: Path, kind: str) -> bytes:
    """Return a picture as WebP, not larger than scenes need it."""
    with Image.open(path) as image:
        picture = image.convert("RGB" if kind == "backgrounds" else "RGBA")
    edge = min(picture.size) if kind == "backgrounds" else max(picture.size)
    if (scale := SIDES[kind] / edge) < 1:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=QUALITY[kind], alpha_quality=90, method=6)
    return content.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


@contextmanager
def open_material(path: Path) -> Iterator[Path]:
    """Give the folder of a material file, unpacked for as long as it is used, or `path` itself if it is a folder.

    Raises:
        UserError: the file is missing or is not a tar file.
    """
    if path.is_dir():
        yield path
        return
    with TemporaryDirectory(prefix="material-") as folder:
        try:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{path}: cannot be unpacked ({error}); make it with scripts/scenes/pack.py") from error
        yield Path(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("material", type=Path, help="folder with cutouts/, extras/ and backgrounds/")
    parser.add_argument("out", type=Path, help="tar file to write")
    args = parser.parse_args(argv)
    try:
        sizes = pack(args.material, args.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts = ", ".join(f"{kind} {size / 2**20:.1f}" for kind, size in sizes.items())
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB (pictures: {parts})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

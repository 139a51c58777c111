"""Compare read_bbox with the original's method, in one run on the same files.

    python benchmarks/read_bbox.py                    3,000 JPEGs of 1024x768, 100,000 rows: both times and their ratio
    python benchmarks/read_bbox.py --rows 2000000     peak memory of ours on that many rows

The original's method is rebuilt from its description: pandas reads the CSV and groups it by image; every image is
decoded for its size; a loop over the rows writes the kept boxes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.timing import timed
from scripts.read_bbox import read_bbox

HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)


def make_images(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """Write copies of 20 JPEGs of a photograph's file size (about 200 KB at 1024x768): smooth colours and noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = sorted(f"{value:016x}" for value in rng.integers(0, 2**63, count))
    for i, name in enumerate(names):
        if i < 20:
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            )
            noisy = np.asarray(coarse) + rng.normal(0, 8, (size[1], size[0], 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.jpg", quality=85)
        else:
            shutil.copyfile(folder / f"{names[i % 20]}.jpg", folder / f"{name}.jpg")
    return names


def make_csv(path: Path, names: list[str], rows: int) -> None:
    """Write rows in the official format, sorted by image like the official files."""
    rng = np.random.default_rng(1)
    owners = np.sort(rng.integers(0, len(names), rows))
    with open(path, "w", encoding="ascii") as file:
        file.write(HEADER)
        # in pieces: on Linux a child's peak memory starts at its parent's size
        for piece in np.array_split(owners, rows // 10_000 + 1):
            x, y = np.sort(rng.random((2, len(piece), 2)), axis=-1)
            for i, (x_min, x_max), (y_min, y_max) in zip(piece.tolist(), x.tolist(), y.tolist(), strict=True):
                box = f"{x_min:.6f},{x_max:.6f},{y_min:.6f},{y_max:.6f}"
                file.write(f"{names[i]},xclick,/m/011k07,1,{box},1,0,0,0,0\n")


def original_way(csv_path: Path, images: Path, out: Path) -> None:
    import cv2
    import pandas as pd

    cv2.setNumThreads(1)
    out.mkdir(parents=True)
    groups = pd.read_csv(csv_path).groupby("ImageID")
    for path in sorted(images.iterdir()):
        if path.stem not in groups.groups:
            continue
        pixels = cv2.imread(str(path))
        assert pixels is not None
        height, width = pixels.shape[:2]
        lines = []
        group = groups.get_group(path.stem)
        corners = (group[column].tolist() for column in ("XMin", "XMax", "YMin", "YMax"))
        for x_min, x_max, y_min, y_max in zip(*corners, strict=True):
            if 0.02 <= (x_max - x_min) * (y_max - y_min) <= 0.8:
                lines.append(f"{x_min * width} {y_min * height} {x_max * width} {y_max * height}\n")
        if lines:
            (out / f"{path.stem}.txt").write_text("".join(lines))


def compare(root: Path, csv_path: Path, repeats: int) -> None:
    theirs, ours = [], []
    for i in range(repeats):  # alternately, because other load on the machine varies
        ours.append(timed(lambda i=i: read_bbox(csv_path, root / "images", "validation", root / f"ours{i}")))
        theirs.append(timed(lambda i=i: original_way(csv_path, root / "images/validation", root / f"theirs{i}")))
    assert texts(root / "ours0") == texts(root / "theirs0"), "both methods must write the same"
    best = [min(run[kind] for run in runs) for runs in (theirs, ours) for kind in (0, 1)]
    print(f"original:       {best[0]:.2f} s wall, {best[1]:.2f} s CPU")
    print(f"read_bbox:      {best[2]:.2f} s wall, {best[3]:.2f} s CPU")
    print(f"ratio:          {best[0] / best[2]:.1f} wall, {best[1] / best[3]:.1f} CPU (best of {repeats}, same output)")


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def measure_memory(root: Path, csv_path: Path) -> None:
    """Measure in a new process, which did not make the data."""
    code = (
        "import resource, sys; from pathlib import Path; from scripts.read_bbox import read_bbox; "
        "read_bbox(Path(sys.argv[1]), Path(sys.argv[2]), 'validation', Path(sys.argv[3])); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    start = time.perf_counter()
    args = [sys.executable, "-c", code, str(csv_path), str(root / "images"), str(root / "out")]
    peak = int(subprocess.run(args, check=True, stdout=subprocess.PIPE, text=True).stdout)
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    print(f"read_bbox: {time.perf_counter() - start:.1f} s, peak memory {peak_bytes / 2**20:.0f} MiB")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000, help="number of JPEGs")
    parser.add_argument("--rows", type=int, default=100_000, help="more than a million: measure memory instead")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    memory_only = args.rows > 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # the memory measurement reads headers only: more and smaller images
        size, count = ((64, 48), max(args.images, args.rows // 9)) if memory_only else ((1024, 768), args.images)
        names = make_images(root / "images/validation", count, size)
        make_csv(root / "annotations.csv", names, args.rows)
        print(f"{count:,} JPEGs of {size[0]}x{size[1]}, {args.rows:,} rows")
        if memory_only:
            measure_memory(root, root / "annotations.csv")
        else:
            compare(root, root / "annotations.csv", args.repeats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

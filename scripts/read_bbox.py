"""Convert Open Images' box annotations to one text file of pixel boxes per image, and to the index of training.

python scripts/read_bbox.py --root dataset/open-images
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ldm.config import DataConfig
from ldm.data.annotations import (
    OPEN_IMAGES_CSV,
    UNFINISHED,
    Unusable,
    annotations_state,
    find_jpegs,
    image_header,
    index_path,
    read_boxes_csv,
)
from ldm.data.box_index import AnnotatedImage, IndexWriter
from ldm.files import Skipped, UserError, write_text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("dataset/open-images"), help="default: %(default)s")
    parser.add_argument("--annotations", type=Path, help="folder of the CSVs; default: ROOT/annotations")
    parser.add_argument("--images", type=Path, help="folder of the image folders; default: ROOT/images")
    parser.add_argument("--out", type=Path, help="folder for the text files; default: ROOT/bbox")
    parser.add_argument("--splits", nargs="+", choices=OPEN_IMAGES_CSV, help="default: those whose CSV is there")
    parser.add_argument("--overwrite", action="store_true", help="write existing text files again")
    args = parser.parse_args(argv)
    annotations = args.annotations or args.root / "annotations"
    images = args.images or args.root / "images"
    out = args.out or args.root / "bbox"
    splits = args.splits or [split for split, name in OPEN_IMAGES_CSV.items() if (annotations / name).exists()]
    try:
        if not splits:
            raise UserError(f"{annotations}: none of {', '.join(OPEN_IMAGES_CSV.values())}; see dataset/README.md")
        for split in splits:
            data = DataConfig(root=str(args.root), annotations=args.out and str(out / split))
            with IndexWriter(index_path(data, split)) as index:
                csv_path = annotations / OPEN_IMAGES_CSV[split]
                report = read_bbox(csv_path, images, split, out / split, index=index, overwrite=args.overwrite)
                state = annotations_state(data, split)
                index.source |= {"format": data.kind, "split": split, "images": str(images), "state": state}
            print(
                f"{split}: {report.rows:,} rows, {report.boxes:,} boxes kept; {report.written:,} files written to "
                f"{out / split}, {report.resumed:,} already there; index in {index.path}"
            )
            if report.skipped:
                print(f"{split}: left out: {report.skipped}")
            if report.list_path:
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.problems.items())
                print(f"{split}: images without a text file: {reasons}; listed in {report.list_path}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass
class Report:
    """What `read_bbox` did for one split.

    Attributes:
        rows, boxes: rows in the CSV, and those kept.
        skipped: damaged rows.
        written, resumed: text files written in this run, and those found complete.
        problems: images with kept boxes but without a usable file, by reason.
        list_path: tab-separated list of these images, or None if there are none.
    """

    rows: int
    boxes: int
    skipped: Skipped
    written: int = 0
    resumed: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    list_path: Path | None = None


def read_bbox(
    csv_path: Path, images: Path, split: str, out: Path, *, index: IndexWriter | None = None, overwrite: bool = False
) -> Report:
    """Write one text file of kept boxes per image of Open Images.

    A line is `x_min y_min x_max y_max class`, in pixels of the stored image and without the class if it is unknown. An
    interrupted run is continued: text files that are there and not empty are kept. Each file appears complete or not at
    all; they are not flushed to disk one by one, which would take hours for 1.7 million.

    Args:
        csv_path: annotations with a header that names ImageID, XMin, XMax, YMin, YMax.
        images: folder that holds the image folders (`train` or `train_0` … `train_f`, `validation`, `test`).
        split: train, validation or test.
        out: folder for the text files.
        index: also gets the images and their boxes.
        overwrite: write existing text files again.

    Raises:
        UserError: the CSV is missing or malformed, or there is no image of the split.
    """
    paths = find_jpegs(images, split)
    if not paths:
        raise UserError(f"{images}: no .jpg under {split}/ or {split}_0/ …; unpack the images there")
    num_rows, num_boxes, found = read_boxes_csv(csv_path, skipped := Skipped())
    out.mkdir(parents=True, exist_ok=True)  # training reads what is there instead of the CSV
    done = set() if overwrite else {entry.name for entry in os.scandir(out) if entry.stat().st_size}
    report, problems = Report(num_rows, num_boxes, skipped), []
    partial, unfinished = out / f".{split}.partial", out / UNFINISHED
    unfinished.touch()
    for id_, objects in tqdm(found, desc=f"{split}: boxes", unit=" images"):
        name = paths.get(id_, f"{split}/{id_}.jpg")
        try:
            size, _ = image_header(f"{images}/{name}", ignore_exif=True)
        except Unusable as error:
            problems.append(f"{id_}\t{error}\n")
            report.problems[str(error)] += 1
            continue
        if index is not None:
            index.add(AnnotatedImage(name, size, objects, relative=True))
        if f"{id_}.txt" in done:
            report.resumed += 1
            continue
        width, height = size
        lines = (f"{a * width} {b * height} {c * width} {d * height} {label}" for (a, b, c, d), label, *_ in objects)
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(f"{line.rstrip()}\n" for line in lines)
        os.replace(partial, f"{out}/{id_}.txt")
        report.written += 1
    partial.unlink(missing_ok=True)  # of an interrupted run
    unfinished.unlink()
    list_path = out.parent / f"{split}-problems.tsv"
    list_path.unlink(missing_ok=True)
    if problems:
        write_text(list_path, "".join(problems))
        report.list_path = list_path
    return report


if __name__ == "__main__":
    raise SystemExit(main())

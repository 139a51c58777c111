"""Convert Open Images' box annotations to one text file of pixel boxes per image, and to the index of training.

python scripts/read_bbox.py --root dataset/open-images
"""

from __future__ import annotations

import argparse
import codecs
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
)
from ldm.data.box_index import MAX_AREA, MIN_AREA, AnnotatedImage, IndexWriter, Object
from ldm.files import Skipped, UserError, write_text

CORNERS = ["XMin", "YMin", "XMax", "YMax"]


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
            index = IndexWriter(index_path(data, split))
            csv_path = annotations / OPEN_IMAGES_CSV[split]
            report = read_bbox(csv_path, images, split, out / split, index=index, overwrite=args.overwrite)
            state = annotations_state(data, split)
            index.source |= {"format": data.kind, "split": split, "images": str(images), "state": state}
            index.write()
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
    out.mkdir(parents=True, exist_ok=True)
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


def read_boxes_csv(csv_path: Path, skipped: Skipped) -> tuple[int, int, Iterator[tuple[str, list[Object]]]]:
    """Read the boxes of Open Images' CSV that cover 2 % to 80 % of their image; `skipped` takes damaged rows.

    Returns:
        Numbers of rows and of those boxes; each image's id and objects. Corners are fractions of the image; classes are
        named by the class descriptions beside the CSV.
    """
    import pandas as pd

    types: Any = {"ImageID": "category", **dict.fromkeys(CORNERS, "float64")}
    try:
        read = _csv_reader(csv_path)
        if "LabelName" in read(nrows=0):
            types["LabelName"] = "category"
        try:
            boxes = read(usecols=list(types), dtype=types)
            if pd.api.types.is_numeric_dtype(boxes.ImageID.cat.categories):
                raise ValueError("ids without their zeros")
        except ValueError:  # or text instead of a number: read again, slower, with a gap there
            boxes = read(usecols=list(types), dtype="str").astype({"ImageID": "category"})
            boxes[CORNERS] = boxes[CORNERS].apply(pd.to_numeric, errors="coerce")
        lacking = boxes.isna().any(axis=1)
        for row in np.flatnonzero(lacking):
            skipped.add("rows that lack a value or number", f"{csv_path}, row {row + 1}")
        rows, boxes = len(boxes), boxes[~lacking] if lacking.any() else boxes
        if boxes.empty:
            raise ValueError("no boxes")
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        reason = f"no readable CSV of boxes ({str(error).strip()})"  # some of pandas' end with a line break
        raise UserError(f"{csv_path}: {reason}; download it, see dataset/README.md") from None
    descriptions: dict[str, str] = {}
    for path in sorted(csv_path.parent.glob("*class-descriptions*.csv")):
        try:
            table = _csv_reader(path)(header=None, dtype=str, keep_default_na=False, encoding_errors="replace")
        except pd.errors.EmptyDataError:
            continue
        except (OSError, ValueError) as error:
            reason = str(error).strip()
            raise UserError(f"{path}: no readable CSV of class names ({reason}); mend or remove it") from None
        descriptions |= dict(table.iloc[:, :2].itertuples(index=False)) if table.shape[1] > 1 else {}
    area = (boxes.XMax - boxes.XMin).clip(lower=0) * (boxes.YMax - boxes.YMin)
    boxes["ImageID"] = boxes.ImageID.cat.reorder_categories(boxes.ImageID.cat.categories.sort_values())
    boxes = boxes.loc[area.between(MIN_AREA, MAX_AREA)]  # frees the others
    if boxes.empty:
        raise UserError(
            f"{csv_path}: no usable box among {rows:,}; corners must be fractions of the image, from 0 to 1"
        )
    kept = boxes.sort_values("ImageID", kind="stable")
    codes, corners = kept.ImageID.cat.codes.to_numpy(), kept[CORNERS].to_numpy()
    labels = kept.LabelName if "LabelName" in kept else pd.Series("", kept.index)
    names = labels.map(lambda label: descriptions.get(label, "")).to_numpy(object)
    starts = np.flatnonzero(np.diff(codes, prepend=-1)).tolist()  # first box of each image
    spans = zip(kept.ImageID.cat.categories[codes[starts]], itertools.pairwise([*starts, len(kept)]), strict=True)
    found = ((id_, map(Object, corners[i:j].tolist(), names[i:j].tolist())) for id_, (i, j) in spans)
    return rows, len(kept), ((id_, list(objects)) for id_, objects in found)


def _csv_reader(path: Path) -> Callable[..., Any]:
    """Return `pandas.read_csv` for a file in UTF-8 or UTF-16, separated by commas, semicolons or tabs."""
    import pandas as pd

    with open(path, "rb") as file:
        head = file.readline()
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    separator = chr(max(b",;\t", key=head.count))
    return partial(pd.read_csv, path, sep=separator, encoding=encoding, skipinitialspace=True)


if __name__ == "__main__":
    raise SystemExit(main())

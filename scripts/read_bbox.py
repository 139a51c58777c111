"""Convert Open Images' box annotations to one text file of pixel boxes per image, and to the index of training.

python scripts/read_bbox.py --root dataset/open-images
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm.data.annotations import (
    OPEN_IMAGES_CSV,
    AnnotationSource,
    annotations_state,
    index_metadata,
    index_path,
    write_box_files,
)
from ldm.data.box_index import IndexWriter
from ldm.files import UserError


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
            source = AnnotationSource(args.root, args.out and out / split)
            with IndexWriter(index_path("open_images", source, split)) as index:
                csv_path = annotations / OPEN_IMAGES_CSV[split]
                report = write_box_files(csv_path, images, split, out / split, index=index, overwrite=args.overwrite)
                state = annotations_state("open_images", source, split)
                index.source |= index_metadata("open_images", images, split, state)
            print(
                f"{split}: {report.rows:,} rows, {report.boxes:,} boxes kept; {report.written:,} files written to "
                f"{out / split}, {report.resumed:,} already there; index in {index.path}"
            )
            if report.list_path:
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.problems.items())
                print(f"{split}: images without a text file: {reasons}; listed in {report.list_path}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Turn Open Images' box annotations into one text file of pixel boxes per image, and one index that training opens.

python scripts/read_bbox.py --root dataset/open-images
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm.data.box_index import BoxIndexError, IndexWriter
from ldm.data.read_bbox import ANNOTATIONS, AnnotationError, read_bbox
from ldm.data.readers import Source, annotations_state, index_path, index_source


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("dataset/open-images"), help="default: %(default)s")
    parser.add_argument("--annotations", type=Path, help="folder of the CSVs; default: ROOT/annotations")
    parser.add_argument("--images", type=Path, help="folder of the image folders; default: ROOT/images")
    parser.add_argument("--out", type=Path, help="folder for the text files; default: ROOT/bbox")
    parser.add_argument("--splits", nargs="+", choices=ANNOTATIONS, help="default: those whose CSV is there")
    parser.add_argument("--overwrite", action="store_true", help="write existing text files again")
    args = parser.parse_args(argv)
    annotations = args.annotations or args.root / "annotations"
    images = args.images or args.root / "images"
    out = args.out or args.root / "bbox"
    splits = args.splits or [split for split, name in ANNOTATIONS.items() if (annotations / name).exists()]
    try:
        if not splits:
            raise AnnotationError(f"{annotations}: none of {', '.join(ANNOTATIONS.values())}; see dataset/README.md")
        for split in splits:
            source = Source(args.root, args.out and out / split)
            with IndexWriter(index_path("open_images", source, split)) as index:
                csv_path = annotations / ANNOTATIONS[split]
                summary = read_bbox(csv_path, images, split, out / split, index=index, overwrite=args.overwrite)
                state = annotations_state("open_images", source, split)
                index.source |= index_source("open_images", images, split, state)
            print(
                f"{split}: {summary.rows:,} rows, {summary.boxes:,} boxes kept; {summary.written:,} files written to "
                f"{out / split}, {summary.resumed:,} already there; index in {index.path}"
            )
            if summary.report:
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.problems.items())
                print(f"{split}: images without a text file: {reasons}; listed in {summary.report}")
    except (AnnotationError, BoxIndexError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

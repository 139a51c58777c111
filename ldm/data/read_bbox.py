"""Open Images box annotations => one text file of pixel boxes per image.

A line is `x_min y_min x_max y_max` in pixels of the stored image. Boxes are kept when they cover 2 % to 80 % of the
image. Only the files' headers are read for their sizes. EXIF orientation is ignored: Open Images' boxes refer to the
pixels as stored (its rotation column says how far image and boxes should be turned together), and the dataset reader
ignores it too.
"""

from __future__ import annotations

import csv
import os
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from ldm.data.box_index import MAX_AREA, MIN_AREA, IndexWriter
from ldm.files import atomic_write

ANNOTATIONS = {
    "train": "oidv6-train-annotations-bbox.csv",
    "validation": "validation-annotations-bbox.csv",
    "test": "test-annotations-bbox.csv",
}
_COLUMNS = ("ImageID", "XMin", "XMax", "YMin", "YMax")
_LABEL = "LabelName"  # a column that may be missing
_CLASS_NAMES = "*class-descriptions*.csv"  # beside the boxes: lines of label and name


class AnnotationError(ValueError):
    """Annotations or images that cannot be used; the message names the file and the remedy."""


@dataclass
class Summary:
    """What `read_bbox` did for one split.

    Attributes:
        written: text files written in this run.
        resumed: text files that were already there.
        boxes: boxes kept in the CSV.
        rows: rows in the CSV.
        problems: images with kept boxes but no text file, by reason.
        report: tab-separated list of these images, or None when there are none.
    """

    written: int = 0
    resumed: int = 0
    boxes: int = 0
    rows: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    report: Path | None = None


def read_bbox(
    csv_path: Path, images: Path, split: str, out: Path, *, index: IndexWriter | None = None, overwrite: bool = False
) -> Summary:
    """Write the kept boxes of one split as text files.

    Memory: the kept boxes are held as 40 bytes each plus about 200 bytes per image (the order of the CSV's rows
    therefore does not matter): about 1.3 GB for the 14.6 million rows of the official training CSV.

    Text files that exist and are not empty are left alone, so an interrupted run goes on where it was. Each file
    appears complete or not at all; they are not flushed to disk one by one, which would take hours for 1.7 million.

    Args:
        csv_path: annotations with a header that names ImageID, XMin, XMax, YMin, YMax.
        images: folder that holds the image folders (`train` or `train_0` … `train_f`, `validation`, `test`).
        split: train, validation or test.
        out: folder for the text files, created when missing.
        index: gets the images and boxes, too; the headers of all images are read then, also of finished ones.
        overwrite: write existing text files again.

    Raises:
        AnnotationError: the CSV is missing or malformed, or there is no image of the split.
    """
    folders = find_images(images, split)
    if not folders:
        raise AnnotationError(f"{images}: no .jpg under {split}/ or {split}_0/ …; unpack the images there")
    out.mkdir(parents=True, exist_ok=True)
    done = set() if overwrite else _finished(out)
    boxes_of = kept_boxes(csv_path)
    summary = Summary(rows=boxes_of.rows, boxes=len(boxes_of.corners))
    temporary = out / f".{split}.{os.getpid()}.tmp"
    problems: list[tuple[str, str]] = []
    try:
        for name, boxes, labels in tqdm(boxes_of, desc=f"{split}: boxes", unit=" images", total=len(boxes_of)):
            if name in done:
                summary.resumed += 1
                if index is None:
                    continue
            try:
                if name not in folders:
                    raise JpegError("missing")
                path = os.path.join(folders[name], name + ".jpg")
                width, height = jpeg_size(path)
            except JpegError as error:
                problems.append((name, str(error)))
                continue
            pixels = [(a * width, b * height, c * width, d * height) for a, b, c, d in boxes.tolist()]
            if index is not None:
                index.add(os.path.relpath(path, images), (width, height), pixels, labels=labels)
            if name in done:
                continue
            with open(temporary, "w", encoding="ascii") as file:
                file.writelines(f"{a} {b} {c} {d}\n" for a, b, c, d in pixels)
            os.replace(temporary, out / f"{name}.txt")
            summary.written += 1
    finally:
        temporary.unlink(missing_ok=True)
    for _, reason in problems:
        summary.problems[reason] = summary.problems.get(reason, 0) + 1
    summary.report = _write_report(out.parent / f"{split}-problems.tsv", problems)
    return summary


def find_images(images: Path, split: str) -> dict[str, str]:
    """Image id => folder, for every .jpg below `images/split` and `images/split_*` (Open Images' train_0 … train_f)."""
    found: dict[str, str] = {}
    for root in sorted([images / split, *images.glob(f"{split}_*")]):
        for folder, _, names in os.walk(root, followlinks=True):
            found.update((name[:-4], folder) for name in names if name.endswith(".jpg"))
    return found


def _finished(out: Path) -> set[str]:
    """Ids with a text file; an empty one is what a power failure may leave."""
    return {e.name[:-4] for e in os.scandir(out) if e.name.endswith(".txt") and e.stat().st_size}


# ---- CSV ----


class KeptBoxes:
    """Boxes of 2 % to 80 % of their image, by image; iterating gives (id, (n, 4) corners, n names) in the ids' order.

    Attributes:
        rows: in the CSV.
        corners: (N, 4) float64 x_min, y_min, x_max, y_max in [0, 1], those of an image in the CSV's order.
    """

    def __init__(
        self,
        ids: list[bytes],
        image_index: np.ndarray,
        corners: np.ndarray,
        classes: list[str],
        class_index: np.ndarray,
        rows: int,
    ) -> None:
        self._ids, self._classes, self.rows = ids, classes, rows
        order = np.argsort(image_index, kind="stable")
        self.corners, self._class_index = corners[order], class_index[order]
        self._ends = np.cumsum(np.bincount(image_index, minlength=len(ids)))

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, list[str]]]:
        for i in sorted(range(len(self)), key=self._ids.__getitem__):
            own = slice(self._ends[i - 1] if i else 0, self._ends[i])
            names = [self._classes[k] for k in self._class_index[own].tolist()]
            yield self._ids[i].decode(), self.corners[own], names


def kept_boxes(csv_path: Path) -> KeptBoxes:
    """Stream the CSV; keep boxes of 2 % to 80 % of the image.

    Raises:
        AnnotationError: the CSV is missing or malformed.
    """
    index_of: dict[bytes, int] = {}
    class_of: dict[bytes, int] = {}
    image_index, class_index, corners, row_count = array("i"), array("i"), array("d"), 0
    for image, label, x_min, x_max, y_min, y_max in _rows(csv_path):
        row_count += 1
        if MIN_AREA <= (x_max - x_min) * (y_max - y_min) <= MAX_AREA:
            image_index.append(index_of.setdefault(image, len(index_of)))
            class_index.append(class_of.setdefault(label, len(class_of)))
            corners.extend((x_min, y_min, x_max, y_max))
    names = _class_names(csv_path.parent)
    return KeptBoxes(
        list(index_of),
        np.frombuffer(image_index, np.int32),
        np.frombuffer(corners).reshape(-1, 4),
        [names.get(label.decode(), "") for label in class_of],
        np.frombuffer(class_index, np.int32),
        row_count,
    )


def _class_names(folder: Path) -> dict[str, str]:
    """Label => name, of all files of class descriptions in a folder; none where there is no such file."""
    names: dict[str, str] = {}
    for path in sorted(folder.glob(_CLASS_NAMES)):
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            names |= {row[0]: row[1] for row in csv.reader(file) if len(row) > 1}
    return names


def _rows(csv_path: Path) -> Iterator[tuple[bytes, bytes, float, float, float, float]]:
    try:
        file = open(csv_path, "rb", buffering=1 << 20)  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        raise AnnotationError(f"{csv_path}: no such file; dataset/README.md says where the CSVs come from") from None
    with file, tqdm(total=os.path.getsize(csv_path), desc=csv_path.name, unit="B", unit_scale=True) as bar:
        header = file.readline().decode(errors="replace").strip().split(",")
        if not set(_COLUMNS) <= set(header):
            got = ",".join(header)[:100]
            raise AnnotationError(f"{csv_path}: expected a header with {', '.join(_COLUMNS)}; got {got!r}")
        i, x0, x1, y0, y1 = (header.index(column) for column in _COLUMNS)
        label = header.index(_LABEL) if _LABEL in header else -1
        cut = max(i, label, x0, x1, y0, y1) + 1
        for number, line in enumerate(file, start=2):
            try:
                f = line.split(b",", cut)
                name = f[label].strip() if label >= 0 else b""
                yield f[i], name, float(f[x0]), float(f[x1]), float(f[y0]), float(f[y1])
            except (ValueError, IndexError):
                if line.strip():
                    got = line[:80].decode(errors="replace")
                    raise AnnotationError(
                        f"{csv_path}, line {number}: expected numbers in XMin … YMax, got {got!r}; download it again"
                    ) from None
            if number % 65536 == 0:
                bar.update(file.tell() - bar.n)
        bar.update(file.tell() - bar.n)


def _write_report(path: Path, problems: list[tuple[str, str]]) -> Path | None:
    if not problems:
        path.unlink(missing_ok=True)
        return None
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(f"{name}\t{reason}\n" for name, reason in problems)
    return path


# ---- JPEG headers ----


class JpegError(ValueError):
    """Why an image has no usable size: `missing`, `not a JPEG`, `truncated` or `unreadable`."""


# Start-of-frame markers carry the size; C4, C8 and CC in their range are tables.
_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TAIL = 1024  # the end marker may be followed by padding


def jpeg_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a JPEG as stored, from its header; also checks that the file has its end marker.

    Raises:
        JpegError: the reason in two words.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            size = _frame_size(file)
            file.seek(-min(_TAIL, file.seek(0, os.SEEK_END)), os.SEEK_END)
            if b"\xff\xd9" not in file.read():
                raise JpegError("truncated")
            return size
    except FileNotFoundError:
        raise JpegError("missing") from None
    except OSError:
        raise JpegError("unreadable") from None


def _frame_size(file: BinaryIO) -> tuple[int, int]:
    """Walk the segments up to the frame header. `block` holds the file from offset `base` on."""
    base, block = 0, file.read(4096)
    if block[:2] != b"\xff\xd8":
        raise JpegError("not a JPEG")
    position = 2
    while True:
        if position + 9 > base + len(block):
            file.seek(position)
            base, block = position, file.read(4096)
            if len(block) < 9:
                raise JpegError("truncated")
        at = position - base
        if block[at] != 0xFF:
            raise JpegError("not a JPEG")
        marker = block[at + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _FRAME:
            height, width = struct.unpack_from(">HH", block, at + 5)
            if not width or not height:
                raise JpegError("not a JPEG")
            return width, height
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a length
            position += 2
        elif marker in (0xD9, 0xDA):  # image ends or starts without a frame header
            raise JpegError("not a JPEG")
        else:
            position += 2 + struct.unpack_from(">H", block, at + 2)[0]

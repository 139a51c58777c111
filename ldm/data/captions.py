"""What training says about a picture: the name of the object in its hole, or a text from a table."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from ldm.data.box_index import BoxIndex, Entry

CLASSES = "classes"
_COLUMNS = {"file_name", "caption"}

Captions = Callable[[Entry, int], str]  # of an image whose box of that number is the hole


class CaptionError(ValueError):
    """Captions that cannot be used; the message names the file and the remedy."""


def open_captions(source: str, index: BoxIndex, count: int) -> Captions:
    """Captions for the first `count` images of an index.

    Args:
        source: `classes`, or a CSV file with the columns file_name, relative to the folder of images, and caption.
        index: the images.
        count: how many of them are used.

    Raises:
        CaptionError: the index knows no classes; the file is missing or damaged, or lacks images.
    """
    if source == CLASSES:
        if not index.has_labels:
            raise CaptionError(
                f"{index.path}: got an index without classes, expected them for data.captions: classes; with Open "
                "Images put class-descriptions-boxable.csv beside the CSVs of boxes and run scripts/read_bbox.py, with "
                "COCO and VOC run scripts/inspect_dataset.py --rebuild; other formats need a CSV file of captions"
            )
        return _class_name
    captions = read_captions(Path(source))
    names = (index[i].name for i in range(count))
    if missing := [name for name in names if name not in captions]:
        raise CaptionError(
            f"{source}: lacks {len(missing):,} of {count:,} images, {missing[0]} first; name each as it is below "
            f"{index.metadata['images']}, with an empty caption where there is nothing to say"
        )
    return lambda entry, _: captions[entry.name]


def _class_name(entry: Entry, chosen: int) -> str:
    return entry.labels[chosen].lower()


def read_captions(path: Path) -> dict[str, str]:
    """File name => caption, from a CSV with a header.

    Raises:
        CaptionError: it is missing, or is no such table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            if not set(reader.fieldnames or ()) >= _COLUMNS:
                raise CaptionError(
                    f"{path}: got the columns {', '.join(reader.fieldnames or ())}, expected file_name and caption"
                )
            return {row["file_name"]: row["caption"] or "" for row in reader}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CaptionError(f"{path}: not a readable CSV ({error}); see data.captions") from None

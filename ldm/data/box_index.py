"""Which images there are and what is marked in them: one memory-mapped file, whatever format the marks came in.

Listing a folder of 1.7 million text files takes minutes and every worker's memory; this file opens at once, and what of
it is touched is shared by all processes. It is a safetensors file with these arrays, of N images and M boxes:

    names, name_ends      UTF-8 bytes of all paths, relative to the folder of images; (N,) where each ends
    sizes                 (N, 2) uint16 width and height in pixels, as stored
    boxes, box_ends       (M, 4) uint16 left, top, right, bottom in pixels, right and bottom exclusive; (N,)
    points, polygon_ends  (P, 2) float32 x, y of all polygons' corners, pixels; (Q,) — where shapes are known
    shape_ends            (M,) where each box's polygons end
    masks, mask_ends      as names, the images' mask files — where masks are known
    classes, class_ends   as names, what boxes can hold; box_classes (M,) int32 what each does — where that is known
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ldm.data.masks import clip_box
from ldm.files import atomic_write
from ldm.images import Box

MIN_AREA, MAX_AREA = 0.02, 0.80  # share of the image that a usable box covers, inclusive
_VERSION = "1"
_LONGEST = 65535  # pixels, what uint16 holds; JPEG's limit, too


class BoxIndexError(ValueError):
    """An index that cannot be read or written; the message names it and the remedy."""


class Entry(NamedTuple):
    """One image of an index.

    Attributes:
        name: path relative to the folder of images.
        size: (width, height) in pixels as stored.
        boxes: inside the image, at least one.
        shapes: per box the outlines of what it holds, (n, 2) float32 x, y each; empty where unknown.
        mask: path of an image whose white part is what the boxes hold, relative to the same folder; "" for none.
        labels: per box the name of what it holds, "" where unknown; none where the annotations name nothing.
    """

    name: str
    size: tuple[int, int]
    boxes: list[Box]
    shapes: list[list[np.ndarray]]
    mask: str
    labels: tuple[str, ...] = ()


class BoxIndex:
    """Reads an index; items are `Entry`.

    Args:
        path: of the file.

    Raises:
        BoxIndexError: there is no such file, or it is damaged or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        remedy = "write it again with scripts/inspect_dataset.py --rebuild"
        self.path = Path(path)
        if not self.path.is_file():
            raise BoxIndexError(f"{path}: no such index; {remedy}")
        try:
            with safe_open(path, framework="pt") as file:  # torch's tensors stay mapped, numpy's would be copied
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 - not iterable
        except (SafetensorError, OSError) as error:
            raise BoxIndexError(f"{path}: {error}; {remedy}") from None
        if self.metadata.get("version") != _VERSION:
            raise BoxIndexError(f"{path}: version {self.metadata.get('version')}, expected {_VERSION}; {remedy}")
        self._arrays: Mapping[str, np.ndarray] = arrays
        self._has_shapes, self._has_masks = "points" in arrays, "masks" in arrays
        self.has_labels = "box_classes" in arrays  # whether the annotations name what boxes hold
        self._classes = [self._text("classes", "class_ends", i) for i in range(len(arrays.get("class_ends", ())))]

    def __len__(self) -> int:
        return len(self._arrays["sizes"])

    @property
    def num_boxes(self) -> int:
        return len(self._arrays["boxes"])

    @property
    def has_shapes(self) -> bool:
        """Whether outlines or masks of what boxes hold are known for some image."""
        return self._has_shapes or self._has_masks

    def __getitem__(self, i: int) -> Entry:
        if not 0 <= i < len(self):
            raise IndexError(i)
        a = self._arrays
        first, last = _span(a["box_ends"], i)
        boxes = [Box(*corners) for corners in a["boxes"][first:last].tolist()]
        shapes: list[list[np.ndarray]] = [[] for _ in boxes]
        if self._has_shapes:
            for k in range(first, last):
                shapes[k - first] = [
                    a["points"][slice(*_span(a["polygon_ends"], q))] for q in range(*_span(a["shape_ends"], k))
                ]
        labels = (self._classes[k] for k in a["box_classes"][first:last].tolist()) if self.has_labels else ()
        width, height = a["sizes"][i].tolist()
        mask = self._text("masks", "mask_ends", i) if self._has_masks else ""
        return Entry(self._text("names", "name_ends", i), (width, height), boxes, shapes, mask, tuple(labels))

    def _text(self, texts: str, ends: str, i: int) -> str:
        first, last = _span(self._arrays[ends], i)
        return os.fsdecode(self._arrays[texts][first:last].tobytes())


def _span(ends: np.ndarray, i: int) -> tuple[int, int]:
    return (int(ends[i - 1]) if i else 0), int(ends[i])


class IndexWriter:
    """Collects images and writes the index when its block ends without an error.

    Memory: 8 bytes per box, about 20 and its path per image, 8 per corner of an outline.

    Args:
        path: of the index.
        source: what it is made from; `BoxIndex.metadata` has it.

    Attributes:
        images, boxes: kept so far.
        dropped: how many boxes or images were not, by reason.
    """

    def __init__(self, path: str | Path, source: Mapping[str, str] | None = None) -> None:
        self.path, self.source = Path(path), dict(source or {})
        self.dropped: Counter[str] = Counter()
        self._names, self._masks = bytearray(), bytearray()
        self._name_ends, self._mask_ends, self._box_ends = array("q"), array("q"), array("q")
        self._sizes, self._boxes = array("H"), array("H")
        self._points, self._polygon_ends, self._shape_ends = array("f"), array("q"), array("q")
        self._classes: dict[str, int] = {}
        self._box_classes = array("i")

    @property
    def images(self) -> int:
        return len(self._name_ends)

    @property
    def boxes(self) -> int:
        return len(self._boxes) // 4

    def add(
        self,
        name: str,
        size: tuple[int, int],
        boxes: Sequence[Sequence[float]],
        shapes: Sequence[Sequence[np.ndarray]] | None = None,
        mask: str = "",
        labels: Sequence[str] | None = None,
    ) -> bool:
        """Take an image with those of its boxes that cover 2 % to 80 % of it.

        Args:
            name: path relative to the folder of images.
            size: (width, height) in pixels.
            boxes: x_min, y_min, x_max, y_max in pixels, possibly fractional or partly outside.
            shapes: per box its outlines, (n, 2) pixels each.
            mask: path of an image with the boxes' content in white.
            labels: per box the name of its content.

        Returns:
            Whether a box was usable.
        """
        width, height = size
        if not (0 < width <= _LONGEST and 0 < height <= _LONGEST):
            self.dropped[f"images of more than {_LONGEST} pixels a side"] += 1
            return False
        kept = 0
        for k, given in enumerate(boxes):
            corners = [round(edge, 3) for edge in given]  # 0.29 of 100 pixels is 29, not 28.999999999999996
            if reason := _unusable(corners, size):
                self.dropped[reason] += 1
                continue
            kept += 1
            x_min, y_min, x_max, y_max = corners
            self._boxes.extend(clip_box(x_min, y_min, x_max, y_max, size))
            for outline in shapes[k] if shapes else ():
                self._points.frombytes(np.ascontiguousarray(outline, dtype=np.float32).tobytes())
                self._polygon_ends.append(len(self._points) // 2)
            self._shape_ends.append(len(self._polygon_ends))
            label = labels[k] if labels else ""
            self._box_classes.append(self._classes.setdefault(label, len(self._classes)))
        if not kept:
            self.dropped["images without a usable box"] += 1
            return False
        self._names += os.fsencode(name)
        self._masks += os.fsencode(mask)
        self._name_ends.append(len(self._names))
        self._mask_ends.append(len(self._masks))
        self._sizes.extend(size)
        self._box_ends.append(self.boxes)
        return True

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write()

    def _write(self) -> None:
        if not self.images:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "no images found"
            raise BoxIndexError(f"{self.path}: not one usable box ({reasons}); check the paths and the annotations")
        arrays = {
            "names": np.frombuffer(self._names, np.uint8),
            "name_ends": np.frombuffer(self._name_ends, np.int64),
            "sizes": np.frombuffer(self._sizes, np.uint16).reshape(-1, 2),
            "boxes": np.frombuffer(self._boxes, np.uint16).reshape(-1, 4),
            "box_ends": np.frombuffer(self._box_ends, np.int64),
        }
        if self._polygon_ends:
            arrays["points"] = np.frombuffer(self._points, np.float32).reshape(-1, 2)
            arrays["polygon_ends"] = np.frombuffer(self._polygon_ends, np.int64)
            arrays["shape_ends"] = np.frombuffer(self._shape_ends, np.int64)
        if self._masks:
            arrays["masks"] = np.frombuffer(self._masks, np.uint8)
            arrays["mask_ends"] = np.frombuffer(self._mask_ends, np.int64)
        if any(self._classes):
            names = [os.fsencode(name) for name in self._classes]
            arrays["classes"] = np.frombuffer(b"".join(names), np.uint8)
            arrays["class_ends"] = np.cumsum([len(name) for name in names])
            arrays["box_classes"] = np.frombuffer(self._box_classes, np.int32)
        metadata = {"version": _VERSION, "dropped": json.dumps(self.dropped), **self.source}
        with atomic_write(self.path) as partial:
            save_file(arrays, partial, metadata=metadata)


def _unusable(corners: Sequence[float], size: tuple[int, int]) -> str:
    """Why a box is left out, or nothing."""
    x_min, y_min, x_max, y_max = corners
    if not (x_min < x_max and y_min < y_max):  # NaN, too
        return "boxes without area"
    width, height = size
    if x_max <= 0 or y_max <= 0 or x_min >= width or y_min >= height:
        return "boxes outside their image"
    share = (x_max - x_min) * (y_max - y_min) / (width * height)
    if share < MIN_AREA:
        return f"boxes of less than {MIN_AREA:.0%} of their image"
    if share > MAX_AREA:
        return f"boxes of more than {MAX_AREA:.0%} of their image"
    return ""

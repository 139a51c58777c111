"""The index of a dataset: image files and their boxes in one memory-mapped file, whatever the annotation format.

Listing a folder of 1.7 million text files takes minutes, and their content fills the memory of every worker. This file
opens at once, and all processes share its pages. It is a safetensors file with these arrays, for N images and M boxes:

    names, name_ends      UTF-8 bytes of all paths, relative to the folder of images; (N,) where each ends
    sizes                 (N, 2) uint16 width and height in pixels, as stored
    boxes, box_ends       (M, 4) uint16 left, top, right, bottom in pixels, right and bottom exclusive; (N,)
    points, polygon_ends  (P, 2) float32 x, y of the corners of all polygons, pixels; (Q,) — where shapes are known
    shape_ends            (M,) where the polygons of each box end
    masks, mask_ends      like names: mask files — where masks are known
    classes, class_ends   like names: class names; box_classes (M,) int32 class of each box — where classes are known
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
from ldm.files import UserError, atomic_write
from ldm.images import Box

MIN_AREA, MAX_AREA = 0.02, 0.80  # fraction of the image that a usable box covers, inclusive
_VERSION = "1"
_MAX_SIDE = 65535  # pixels; the range of uint16, and JPEG's limit
_COLUMNS = {  # type code of `array.array`, and shape
    "names": ("B", -1), "name_ends": ("q", -1),
    "sizes": ("H", (-1, 2)),
    "boxes": ("H", (-1, 4)), "box_ends": ("q", -1),
    "points": ("f", (-1, 2)), "polygon_ends": ("q", -1), "shape_ends": ("q", -1),
    "masks": ("B", -1), "mask_ends": ("q", -1),
    "classes": ("B", -1), "class_ends": ("q", -1), "box_classes": ("i", -1),
}  # fmt: skip
_OPTIONAL = {  # column that is empty in datasets without this => columns that are then left out
    "points": ("points", "polygon_ends", "shape_ends"),
    "masks": ("masks", "mask_ends"),
    "classes": ("classes", "class_ends", "box_classes"),
}
_REBUILD = "write it again with scripts/inspect_dataset.py --rebuild"


class Entry(NamedTuple):
    """One image of an index.

    Attributes:
        name: path relative to the folder of images.
        size: (width, height) in pixels as stored.
        boxes: at least one, inside the image.
        shapes: per box the outlines of its object, each (n, 2) float32 x, y; empty where unknown.
        mask: path of an image in which the objects of the boxes are white, relative to the same folder; "" if none.
        labels: class name per box ("" if unknown); empty tuple if the dataset has no classes.
    """

    name: str
    size: tuple[int, int]
    boxes: list[Box]
    shapes: list[list[np.ndarray]]
    mask: str
    labels: tuple[str, ...] = ()


class BoxIndex:
    """Read an index; its items are `Entry` objects.

    Args:
        path: of the file.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such index; {_REBUILD}")
        try:
            with safe_open(path, framework="pt") as file:  # torch's tensors stay mapped, numpy's would be copied
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                self._arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {error}; {_REBUILD}") from None
        if self.metadata.get("version") != _VERSION:
            raise UserError(f"{path}: version {self.metadata.get('version')}, expected {_VERSION}; {_REBUILD}")
        self.has_labels = "box_classes" in self._arrays
        self._classes = [self._text("classes", "class_ends", i) for i in range(len(self._arrays.get("class_ends", ())))]

    def __len__(self) -> int:
        return len(self._arrays["sizes"])

    @property
    def num_boxes(self) -> int:
        return len(self._arrays["boxes"])

    @property
    def has_shapes(self) -> bool:
        """Whether outlines or masks are known for some image."""
        return "points" in self._arrays or "masks" in self._arrays

    def __getitem__(self, i: int) -> Entry:
        if not 0 <= i < len(self):
            raise IndexError(i)
        width, height = self._arrays["sizes"][i].tolist()
        boxes = self._span("box_ends", i)
        return Entry(
            name=self._text("names", "name_ends", i),
            size=(width, height),
            boxes=[Box(*corners) for corners in self._arrays["boxes"][boxes].tolist()],
            shapes=[self._shapes(k) for k in range(boxes.start, boxes.stop)],
            mask=self._text("masks", "mask_ends", i) if "masks" in self._arrays else "",
            labels=tuple(self._classes[k] for k in self._arrays["box_classes"][boxes]) if self.has_labels else (),
        )

    def _shapes(self, box: int) -> list[np.ndarray]:
        if "points" not in self._arrays:
            return []
        polygons = self._span("shape_ends", box)
        return [self._arrays["points"][self._span("polygon_ends", k)] for k in range(polygons.start, polygons.stop)]

    def _text(self, name: str, ends: str, i: int) -> str:
        return os.fsdecode(self._arrays[name][self._span(ends, i)].tobytes())

    def _span(self, ends: str, i: int) -> slice:
        """The rows of entry `i` in a column of which `ends` says where its entries end."""
        return slice(int(self._arrays[ends][i - 1]) if i else 0, int(self._arrays[ends][i]))


class IndexWriter:
    """Collect images, and write the index when the `with` block ends without an error.

    Memory: 16 bytes per box, about 30 and the path per image, 8 per corner of an outline.

    Args:
        path: of the index.
        source: origin of the annotations; becomes part of `BoxIndex.metadata`.

    Attributes:
        dropped: number of boxes or images left out, by reason.
    """

    def __init__(self, path: str | Path, source: Mapping[str, str] | None = None) -> None:
        self.path, self.source = Path(path), dict(source or {})
        self.dropped: Counter[str] = Counter()
        self._columns = {name: array(typecode) for name, (typecode, _) in _COLUMNS.items()}
        self._classes: dict[str, int] = {}

    @property
    def images(self) -> int:
        """Number of images so far."""
        return len(self._columns["box_ends"])

    @property
    def boxes(self) -> int:
        """Number of boxes so far."""
        return len(self._columns["boxes"]) // 4

    def __enter__(self) -> IndexWriter:
        return self

    def add(
        self,
        name: str,
        size: tuple[int, int],
        boxes: Sequence[Sequence[float]],
        shapes: Sequence[Sequence[np.ndarray]] | None = None,
        mask: str = "",
        labels: Sequence[str] | None = None,
    ) -> bool:
        """Add an image with those of its boxes that cover 2 % to 80 % of it.

        Args:
            name: path relative to the folder of images.
            size: (width, height) in pixels.
            boxes: x_min, y_min, x_max, y_max in pixels, possibly fractional or partly outside the image.
            shapes: per box its outlines, each (n, 2) in pixels.
            mask: path of an image in which the objects are white.
            labels: class name per box.

        Returns:
            Whether a box was usable.
        """
        if not all(0 < side <= _MAX_SIDE for side in size):
            self.dropped[f"images of more than {_MAX_SIDE} pixels a side"] += 1
            return False
        before, columns = self.boxes, self._columns
        for k, box in enumerate(boxes):
            x_min, y_min, x_max, y_max = (round(edge, 3) for edge in box)  # 0.29 of 100 pixels: 28.999999999999996
            if reason := _unusable(x_min, y_min, x_max, y_max, size):
                self.dropped[reason] += 1
                continue
            columns["boxes"].extend(clip_box(x_min, y_min, x_max, y_max, size))
            for outline in shapes[k] if shapes else ():
                columns["points"].extend(np.ravel(outline).tolist())
                columns["polygon_ends"].append(len(columns["points"]) // 2)
            columns["shape_ends"].append(len(columns["polygon_ends"]))
            columns["box_classes"].append(self._classes.setdefault(labels[k] if labels else "", len(self._classes)))
        if self.boxes == before:
            self.dropped["images without a usable box"] += 1
            return False
        columns["sizes"].extend(size)
        columns["box_ends"].append(self.boxes)
        self._append_text("names", "name_ends", name)
        self._append_text("masks", "mask_ends", mask)
        return True

    def _append_text(self, name: str, ends: str, text: str) -> None:
        self._columns[name].frombytes(os.fsencode(text))
        self._columns[ends].append(len(self._columns[name]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write()

    def _write(self) -> None:
        if not self.images:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "no images found"
            raise UserError(f"{self.path}: not one usable box ({reasons}); check the paths and the annotations")
        for name in self._classes:
            self._append_text("classes", "class_ends", name)
        arrays = {name: np.asarray(self._columns[name]).reshape(shape) for name, (_, shape) in _COLUMNS.items()}
        for known, names in _OPTIONAL.items():
            if not len(arrays[known]):
                arrays = {name: array for name, array in arrays.items() if name not in names}
        metadata = {"version": _VERSION, "dropped": json.dumps(self.dropped), **self.source}
        with atomic_write(self.path) as partial:
            save_file(arrays, partial, metadata=metadata)


def _unusable(x_min: float, y_min: float, x_max: float, y_max: float, size: tuple[int, int]) -> str:
    """Return the reason why a box is left out, or an empty string."""
    width, height = size
    if not (x_min < x_max and y_min < y_max):  # also true of NaN
        return "boxes without area"
    if x_max <= 0 or y_max <= 0 or x_min >= width or y_min >= height:
        return "boxes outside their image"
    area = (x_max - x_min) * (y_max - y_min) / (width * height)
    if area < MIN_AREA:
        return f"boxes of less than {MIN_AREA:.0%} of their image"
    if area > MAX_AREA:
        return f"boxes of more than {MAX_AREA:.0%} of their image"
    return ""

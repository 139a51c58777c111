"""The index of a dataset: image files and their boxes in one memory-mapped file, whatever the annotation format.

It is a safetensors file with the arrays of `_COLUMNS`, for N images and M boxes. Texts and lists of varying length lie
end to end; `…_ends` says where each ends.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ldm.data.masks import clip_box
from ldm.files import Skipped, UserError, atomic_write
from ldm.images import Box

MIN_AREA, MAX_AREA = 0.02, 0.80  # fraction of the image that a usable box covers, inclusive
NO_BOX, CROWD, SKIPPED_EXIF = "images without a usable box", "crowds", "images rotated by EXIF, see data.exif"
_SMALL = f"boxes of less than {MIN_AREA:.0%} of their image"
_LARGE = f"boxes of more than {MAX_AREA:.0%} of their image"
_BY_CHOICE = {NO_BOX, CROWD, SKIPPED_EXIF, _SMALL, _LARGE}  # reasons that are no faults of the data
_VERSION = "1"
_MAX_SIDE = 65535  # pixels; the range of uint16, and JPEG's limit
_COLUMNS = {  # type code of `array.array`; shape; column without which this one says nothing and is left out
    "names": ("B", -1, "names"), "name_ends": ("q", -1, "names"),  # (N,) paths relative to the folder of images, UTF-8
    "sizes": ("H", (-1, 2), "names"),  # (N, 2) width and height in pixels, turned by the orientation
    "orientations": ("B", -1, "names"),  # (N,) EXIF orientation that turns the stored pixels
    "boxes": ("H", (-1, 4), "names"), "box_ends": ("q", -1, "names"),  # (M, 4) as `Box`; (N,)
    "points": ("f", (-1, 2), "points"), "polygon_ends": ("q", -1, "points"),  # x, y of the corners of all polygons
    "shape_ends": ("q", -1, "points"),  # (M,) polygons of each box
    "masks": ("B", -1, "masks"), "mask_ends": ("q", -1, "masks"),  # (N,) mask files
    "classes": ("B", -1, "classes"), "class_ends": ("q", -1, "classes"),  # class names
    "box_classes": ("i", -1, "classes"),  # (M,) class of each box
}  # fmt: skip
_REBUILD = "write it again with scripts/inspect_dataset.py --rebuild"
Size = tuple[int, int]  # (width, height) in pixels


class Object(NamedTuple):
    """An object of an image, as it was annotated."""

    box: Sequence[float]  # x_min, y_min, x_max, y_max; may be partly outside the image
    label: str = ""  # class name, if known
    outlines: Sequence[np.ndarray] = ()  # each (n, 2) x, y
    place: str = ""  # where it was read; default: the image's name


@dataclass
class AnnotatedImage:
    """An image as it was annotated; see `Entry`."""

    name: str
    size: Size | None = None  # None: unknown
    objects: list[Object] = field(default_factory=list)
    mask: str = ""
    orientation: int = 1
    relative: bool = False  # boxes and outlines are in fractions of the size
    problems: list[tuple[str, str]] = field(default_factory=list)  # reason and place of what cannot be used


class Entry(NamedTuple):
    """One image of an index."""

    name: str  # path relative to the folder of images
    size: Size
    boxes: list[Box]  # at least one, inside the image
    shapes: list[list[np.ndarray]]  # per box the outlines of its object, each (n, 2) float32 x, y; empty: unknown
    mask: str  # path of an image in which the objects are white, relative to the same folder; "" if none
    labels: tuple[str, ...] = ()  # class name per box ("" if unknown); empty if the dataset has no classes
    orientation: int = 1  # EXIF orientation that turns the stored pixels, before all else here applies; 1: as stored


class BoxIndex:
    """Open an index of `Entry` objects; UserError if the file is missing, damaged, or of another version."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:  # torch's tensors stay mapped, numpy's would be copied
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                self._arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {str(error).removesuffix(f': {path}')}; {_REBUILD}") from None
        if self.metadata.get("version") != _VERSION:
            raise UserError(f"{path}: version {self.metadata.get('version')}, expected {_VERSION}; {_REBUILD}")
        self.num_boxes, self.has_labels = len(self._arrays["boxes"]), "box_classes" in self._arrays
        self.has_shapes = "points" in self._arrays or "masks" in self._arrays  # of some image
        self._classes = [self._text("classes", "class_ends", i) for i in range(len(self._arrays.get("class_ends", ())))]

    @property
    def left_out(self) -> list[str]:
        """What was left out of the dataset, and its first places, in a line for each reason."""
        counts = json.loads(self.metadata.get("dropped", "{}"))
        return [f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1])]

    def __len__(self) -> int:
        return len(self._arrays["sizes"])

    def __getitem__(self, i: int) -> Entry:
        if not 0 <= i < len(self):
            raise IndexError(i)
        width, height = self._arrays["sizes"][i].tolist()
        boxes, orientations = self._span("box_ends", i), self._arrays.get("orientations")
        return Entry(
            name=self._text("names", "name_ends", i),
            size=(width, height),
            boxes=[Box(*corners) for corners in self._arrays["boxes"][boxes].tolist()],
            shapes=[self._shapes(k) for k in range(boxes.start, boxes.stop)],
            mask=self._text("masks", "mask_ends", i) if "masks" in self._arrays else "",
            labels=tuple(self._classes[k] for k in self._arrays["box_classes"][boxes]) if self.has_labels else (),
            orientation=1 if orientations is None else int(orientations[i]),
        )

    def _shapes(self, box: int) -> list[np.ndarray]:
        polygons = self._span("shape_ends", box) if "points" in self._arrays else slice(0, 0)
        return [self._arrays["points"][self._span("polygon_ends", k)] for k in range(polygons.start, polygons.stop)]

    def _text(self, name: str, ends: str, i: int) -> str:
        return os.fsdecode(self._arrays[name][self._span(ends, i)].tobytes())

    def _span(self, ends: str, i: int) -> slice:
        """Return the rows of entry `i`."""
        return slice(int(self._arrays[ends][i - 1]) if i else 0, int(self._arrays[ends][i]))


class IndexWriter:
    """Collect images in memory, and write their index."""

    def __init__(self, path: str | Path, source: Mapping[str, str] | None = None, *, strict: bool = False) -> None:
        """With `strict` the first fault of the data is a UserError, not left out."""
        self.path, self.source = Path(path), dict(source or {})  # origin of the annotations, for `BoxIndex.metadata`
        self.left_out = Skipped(strict=strict, allowed=_BY_CHOICE)  # boxes and images
        self._columns = {name: array(typecode) for name, (typecode, *_) in _COLUMNS.items()}
        self._classes: dict[str, int] = {}

    def add(self, image: AnnotatedImage) -> None:
        """Add an image of known size with those of its objects whose boxes cover 2 % to 80 % of it, if any."""
        assert image.size is not None
        name, size = image.name, image.size
        if max(size) > _MAX_SIDE:
            self.left_out.add(f"images of more than {_MAX_SIDE} pixels a side", name)
            return
        columns, scale = self._columns, size if image.relative else (1, 1)
        before = len(columns["shape_ends"])
        for box, label, outlines, place in image.objects:
            # 0.29 of 100 pixels: 28.999999999999996
            x_min, y_min, x_max, y_max = [round(edge * k, 3) for edge, k in zip(box, scale * 2, strict=True)]
            if reason := _unusable(x_min, y_min, x_max, y_max, size):
                self.left_out.add(reason, place or name)
                continue
            columns["boxes"].extend(clip_box(x_min, y_min, x_max, y_max, size))
            for outline in outlines:
                columns["points"].extend(np.ravel(outline * scale).tolist())
                columns["polygon_ends"].append(len(columns["points"]) // 2)
            columns["shape_ends"].append(len(columns["polygon_ends"]))
            columns["box_classes"].append(self._classes.setdefault(label, len(self._classes)))
        if len(columns["shape_ends"]) == before:
            self.left_out.add(NO_BOX, name)
            return
        columns["sizes"].extend(size)
        columns["orientations"].append(image.orientation)
        columns["box_ends"].append(len(columns["shape_ends"]))
        self._append_text("names", "name_ends", name)
        self._append_text("masks", "mask_ends", image.mask)

    def _append_text(self, name: str, ends: str, text: str) -> None:
        self._columns[name].frombytes(os.fsencode(text))
        self._columns[ends].append(len(self._columns[name]))

    def write(self) -> None:
        """Write the index; UserError if there is not one usable box."""
        if not self._columns["names"]:
            reasons = self.left_out or "no images found"
            raise UserError(f"{self.path}: not one usable box ({reasons}); check the paths and the annotations")
        for name in self._classes:
            self._append_text("classes", "class_ends", name)
        arrays = {
            name: np.asarray(self._columns[name]).reshape(shape)
            for name, (_, shape, needed) in _COLUMNS.items()
            if self._columns[needed]
        }
        places, counts = self.left_out.places, self.left_out.counts
        dropped = {f"{reason} ({', '.join(places[reason])})": count for reason, count in counts.items()}
        metadata = {"version": _VERSION, "dropped": json.dumps(dropped), **self.source}
        with atomic_write(self.path) as partial:
            save_file(arrays, partial, metadata=metadata)


def turned_size(size: Size, orientation: int) -> Size:
    """Return the size of an image after turning it as its EXIF orientation, 1 to 8, says; or invert that."""
    return (size[1], size[0]) if orientation >= 5 else size


def _unusable(x_min: float, y_min: float, x_max: float, y_max: float, size: Size) -> str:
    """Return the reason why a box is left out, or an empty string."""
    width, height = size
    if not math.isfinite(x_min + y_min + x_max + y_max):
        return "boxes with corners that are not finite"
    if not (x_min < x_max and y_min < y_max):
        return "boxes without area"
    if x_max <= 0 or y_max <= 0 or x_min >= width or y_min >= height:
        return "boxes outside their image"
    area = (x_max - x_min) * (y_max - y_min) / (width * height)
    return _SMALL if area < MIN_AREA else _LARGE if area > MAX_AREA else ""

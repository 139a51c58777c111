"""Read box annotations in common formats, and write the index (`ldm.data.box_index`) that training opens.

    open_images  ROOT/images/{train…,validation,test}/**/ID.jpg with ROOT/bbox/SPLIT/ID.txt (`scripts/read_bbox.py`) or,
                 where those are missing, the CSVs in ROOT/annotations
    coco         instances JSON: boxes, polygons as shapes
    voc          ROOT/Annotations/*.xml, ROOT/JPEGImages, ROOT/ImageSets/Main/{train,val}.txt
    yolo         …/images/**/NAME.jpg with …/labels/**/NAME.txt: boxes, or polygons as shapes
    masks        ROOT/images/NAME.* with ROOT/masks/NAME.png, white = object: one box per connected white component

A dataset without training and validation splits is split by a hash of the image names. Images that are added later
therefore move few of the others.

Open Images' boxes refer to the pixels as stored, so its EXIF orientation is ignored. In the other formats nobody knows
whether the boxes refer to the image before or after rotation: images that EXIF rotates are left out.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import logging
import os
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from filelock import FileLock
from PIL import ExifTags, Image
from tqdm import tqdm

from ldm.data.box_index import MAX_AREA, MIN_AREA, BoxIndex, IndexWriter
from ldm.files import UserError
from ldm.images import IMAGE_SUFFIXES, UNREADABLE

if TYPE_CHECKING:
    import pandas as pd

OPEN_IMAGES_CSV = {
    "train": "oidv6-train-annotations-bbox.csv",
    "validation": "validation-annotations-bbox.csv",
    "test": "test-annotations-bbox.csv",
}
VALIDATION_SHARE, MIN_VALIDATION = 0.05, 8  # of the images, where a dataset has no validation split
_CORNERS = ["XMin", "YMin", "XMax", "YMax"]  # columns of Open Images' CSV
_MIN_COMPONENT = 16  # pixels of a mask's connected component that counts as an object
logger = logging.getLogger(__name__)


class AnnotationSource(NamedTuple):
    """Where annotations are.

    Attributes:
        root: folder of the images, or of the whole layout of the format.
        annotations: file or folder; None is the place that the format has for them below the root.
        val_annotations: the same for validation.
    """

    root: Path
    annotations: Path | None = None
    val_annotations: Path | None = None


class AnnotatedImage(NamedTuple):
    """The annotations of one image: the arguments of `IndexWriter.add`.

    The size is None where the annotations lack it. With `relative`, boxes and shapes are fractions of width and
    height. A `problem` says why the annotations could not be read.
    """

    name: str
    size: tuple[int, int] | None = None
    boxes: Sequence[Sequence[float]] = ()
    shapes: Sequence[Sequence[np.ndarray]] | None = None
    mask: str = ""
    labels: Sequence[str] | None = None
    relative: bool = False
    problem: str = ""

    def to_pixels(self, size: tuple[int, int]) -> AnnotatedImage:
        """Return the same annotations in pixels of an image of `size` (width, height)."""
        if not self.relative:
            return self._replace(size=size)
        w, h = size
        boxes = [(a * w, b * h, c * w, d * h) for a, b, c, d in self.boxes]
        shapes = self.shapes and [[outline * size for outline in outlines] for outlines in self.shapes]
        return self._replace(size=size, boxes=boxes, shapes=shapes, relative=False)


class SplitReader(NamedTuple):
    """The annotations of one split.

    Attributes:
        images: folder that the names of the images are relative to.
        items: the annotated images.
        has_split: whether `items` belong to this split alone. Otherwise they are all images, to be split by hash.
        ignore_exif: whether boxes are known to refer to the pixels as stored.
    """

    images: Path
    items: Iterable[AnnotatedImage]
    has_split: bool
    ignore_exif: bool = False


# ---- index ----


def open_index(kind: str, source: AnnotationSource, split: str, folder: Path | None = None) -> BoxIndex:
    """Open the index of a split; write it first if it is missing or older than the annotations.

    Of several processes one writes and the others wait. A change inside an annotation file of a folder goes unnoticed
    as long as no file is added or removed: `scripts/inspect_dataset.py --rebuild` writes the index again.

    Args:
        kind: a key of READERS.
        source: where the annotations are.
        split: train or validation (open_images: also test).
        folder: folder of the indexes; None is ROOT/index.

    Raises:
        UserError: the annotations cannot be read, they hold no usable box, or the folder is not writable.
    """
    path = index_path(kind, source, split, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            state = annotations_state(kind, source, split)
            if path.is_file() and (index := BoxIndex(path)).metadata.get("state") == state:
                return index
            write_index(path, kind, source, split, state=state)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot keep an index there ({error.strerror}); name another folder with data.index"
        ) from None
    return BoxIndex(path)


def index_path(kind: str, source: AnnotationSource, split: str, folder: Path | None = None) -> Path:
    """Return the path of the index that `open_index` opens."""
    return (folder or source.root / "index") / f"{kind}-{split}.safetensors"


def annotations_state(kind: str, source: AnnotationSource, split: str) -> str:
    """Hash times and sizes of the annotations: changes when a file changes, or is added to or removed from a folder."""
    if kind == "open_images":  # millions of images: their folders are not walked
        csv_path = source.root / "annotations" / OPEN_IMAGES_CSV[split]
        places = [source.annotations or source.root / "bbox" / split, csv_path]
    else:
        named = [place for place in (source.annotations, source.val_annotations) if place is not None]
        walked = [source.root, *(place for place in named if place.is_dir())]
        folders = (Path(folder) for root in walked for folder, *_ in os.walk(root))
        places = [*named, *(folder for folder in folders if folder.name != "index")]
    stats = [(str(place), place.stat()) for place in places if place.exists()]
    text = json.dumps([[name, stat.st_mtime_ns, stat.st_size] for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def write_index(path: Path, kind: str, source: AnnotationSource, split: str, *, state: str = "") -> IndexWriter:
    """Read the annotations of one split and write their index.

    Args:
        path: of the index.
        kind: a key of READERS.
        source: where the annotations are.
        split: train or validation (open_images: also test).
        state: stored in the index; tells later whether the index is still valid.

    Returns:
        The writer, with its counts.

    Raises:
        UserError: the annotations cannot be read, or hold no usable box.
    """
    if kind not in READERS:
        raise UserError(f"data.kind: got {kind!r}, which holds no annotations; expected one of {', '.join(READERS)}")
    reader = READERS[kind](source, split)
    items = reader.items
    if not reader.has_split:
        everything = list(items)
        validation = held_out(item.name for item in everything)
        items = [item for item in everything if (item.name in validation) == (split == "validation")]
    with IndexWriter(path, index_metadata(kind, reader.images, split, state)) as writer:
        for item in tqdm(items, desc=f"{split}: {kind}", unit=" images"):
            if item.problem:
                logger.warning("%s: left out (%s)", item.name, item.problem)
                writer.dropped["annotations that cannot be read"] += 1
                continue
            try:
                size = stored_size(reader.images / item.name, ignore_exif=reader.ignore_exif)
            except UnusableImageError as error:
                writer.dropped[f"images {error}"] += 1
                continue
            if item.size not in (None, size):
                writer.dropped["images of another size than annotated"] += 1
                continue
            image = item.to_pixels(size)
            writer.add(image.name, size, image.boxes, image.shapes, image.mask, image.labels)
    return writer


def index_metadata(kind: str, images: Path, split: str, state: str) -> dict[str, str]:
    """Return the metadata that record the origin of an index."""
    return {"format": kind, "split": split, "images": str(images), "state": state}


def held_out(names: Iterable[str]) -> set[str]:
    """Choose the validation images of a dataset without splits: 5 %, at least 8, at most a quarter, by name hash."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    count = max(round(VALIDATION_SHARE * len(ordered)), MIN_VALIDATION)
    return set(ordered[: min(count, len(ordered) // 4)])


# ---- image files ----


class UnusableImageError(UserError):
    """An image that training cannot use. The message is the reason in a few words, by which images are counted."""


def stored_size(path: str | Path, *, ignore_exif: bool = False) -> tuple[int, int]:
    """Read (width, height) of an image file as stored from its header; also detects truncated JPEGs.

    Raises:
        UnusableImageError: the file is missing, damaged, or no image; or EXIF rotates it and `ignore_exif` is false.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            if not ignore_exif and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                raise UnusableImageError("rotated by EXIF orientation; save them upright")
            if image.format in ("JPEG", "MPO"):
                file.seek(-min(1024, file.seek(0, os.SEEK_END)), os.SEEK_END)  # padding may follow the end marker
                if b"\xff\xd9" not in file.read():
                    raise UnusableImageError("truncated")
            return image.size
    except FileNotFoundError:
        raise UnusableImageError("missing") from None
    except UnusableImageError:
        raise
    except UNREADABLE:
        raise UnusableImageError("unreadable") from None


# ---- Open Images ----


def read_open_images(source: AnnotationSource, split: str) -> SplitReader:
    """Read Open Images' text files of pixel boxes, or else the official CSV."""
    images, texts = source.root / "images", source.annotations or source.root / "bbox" / split
    csv_path = source.annotations or source.root / "annotations" / OPEN_IMAGES_CSV[split]
    paths = find_jpegs(images, split)
    if texts.is_dir():
        named = [(paths.get(text.stem, text.stem), text) for text in _files(texts, (".txt",))]
        items = _parsed(named, lambda name, text: AnnotatedImage(name, boxes=_boxes(text)))
    elif csv_path.is_file():
        boxes, _ = read_boxes_csv(csv_path)
        items = (
            AnnotatedImage(paths.get(id_, id_), boxes=corners.tolist(), labels=labels, relative=True)
            for id_, corners, labels in boxes_by_image(boxes, csv_path.parent)
        )
    else:
        raise UserError(f"{texts}: no such folder, and no {csv_path}; dataset/README.md says where the CSVs come from")
    return SplitReader(images, items, has_split=True, ignore_exif=True)


def find_jpegs(images: Path, split: str) -> dict[str, str]:
    """Find every .jpg below `images/split` and `images/split_*` (Open Images' train_0 … train_f).

    Returns:
        Path relative to `images` by image id.
    """
    paths: dict[str, str] = {}
    for root in sorted([images / split, *images.glob(f"{split}_*")]):
        for folder, _, names in os.walk(root, followlinks=True):
            prefix = os.path.relpath(folder, images)
            paths.update((name[:-4], f"{prefix}/{name}") for name in names if name.endswith(".jpg"))
    return paths


def read_boxes_csv(csv_path: Path) -> tuple[pd.DataFrame, int]:
    """Read the boxes of Open Images' CSV that cover 2 % to 80 % of their image.

    Memory: about 50 bytes per kept box, and 100 per image.

    Returns:
        The boxes, sorted by image, with the columns ImageID, LabelName, XMin, YMin, XMax, YMax in [0, 1]; the boxes of
        an image keep the order of the CSV. And the number of rows in the CSV.

    Raises:
        UserError: the CSV is missing or malformed.
    """
    import pandas as pd  # part of the training extra
    from pandas.api.types import union_categoricals

    kept, num_rows = [], 0
    try:
        columns = list(pd.read_csv(csv_path, nrows=0))
        if missing := {"ImageID", *_CORNERS}.difference(columns):
            raise UserError(f"{csv_path}: got the columns {', '.join(columns)}; lacks {', '.join(sorted(missing))}")
        texts = [name for name in ("ImageID", "LabelName") if name in columns]
        types: Any = dict.fromkeys(texts, "category") | dict.fromkeys(_CORNERS, "float64")
        with pd.read_csv(csv_path, usecols=list(types), dtype=types, chunksize=2**18) as chunks:
            for chunk in tqdm(chunks, desc=csv_path.name, unit=f" x {2**18:,} rows"):
                if chunk.isna().any(axis=None):
                    raise UserError(f"{csv_path}: row {chunk.isna().any(axis=1).idxmax() + 1} lacks a value")
                num_rows += len(chunk)
                area = (chunk.XMax - chunk.XMin) * (chunk.YMax - chunk.YMin)
                kept.append(chunk[area.between(MIN_AREA, MAX_AREA)])
    except FileNotFoundError:
        raise UserError(f"{csv_path}: no such file; dataset/README.md says where the CSVs come from") from None
    except ValueError as error:  # pandas' errors are ValueErrors
        raise error if isinstance(error, UserError) else UserError(f"{csv_path}: {error}; download it again") from None
    if not num_rows:
        raise UserError(f"{csv_path}: holds no boxes; download it again")
    boxes = pd.concat([chunk[_CORNERS] for chunk in kept])
    for name in texts:
        boxes[name] = union_categoricals([chunk[name] for chunk in kept], sort_categories=True)
    return boxes.sort_values("ImageID", kind="stable"), num_rows


def boxes_by_image(boxes: pd.DataFrame, folder: Path) -> Iterator[tuple[str, np.ndarray, list[str]]]:
    """Iterate over the images of `read_boxes_csv`: id, (n, 4) corners in [0, 1], class name of each box ("": unknown).

    The names of the classes come from the files of class descriptions in `folder`.
    """
    descriptions: dict[str, str] = {}
    for path in sorted(folder.glob("*class-descriptions*.csv")):
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            descriptions |= {row[0]: row[1] for row in csv.reader(file) if len(row) > 1}
    ids, corners = boxes.ImageID.cat, boxes[_CORNERS].to_numpy()
    codes = ids.codes.to_numpy()
    names = np.array([""] * len(boxes), dtype=object)
    if "LabelName" in boxes:
        known = [descriptions.get(label, "") for label in boxes.LabelName.cat.categories]
        names = np.array(known, dtype=object)[boxes.LabelName.cat.codes]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))  # first box of each image
    present = ids.categories[codes[starts]].tolist()
    for id_, (start, end) in zip(present, itertools.pairwise([*starts.tolist(), len(boxes)]), strict=True):
        yield id_, corners[start:end], names[start:end].tolist()


# ---- other formats ----


def read_coco(source: AnnotationSource, split: str) -> SplitReader:
    """Read COCO instances: `annotations`, and `val_annotations` for validation if they are named."""
    path = source.val_annotations if split == "validation" and source.val_annotations else source.annotations
    if path is None:
        raise UserError("data.annotations: format coco needs the path of a JSON file")
    try:
        items = list(_coco_images(json.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check data.annotations") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not COCO instances ({error!r}); expected images, annotations, bbox") from None
    return SplitReader(source.root, items, has_split=source.val_annotations is not None)


def _coco_images(content: dict[str, Any]) -> Iterator[AnnotatedImage]:
    names = {category["id"]: str(category["name"]) for category in content.get("categories", [])}
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd", 0):
            by_image[annotation["image_id"]].append(annotation)
    for image in content["images"]:
        boxes, shapes, labels = [], [], []
        for annotation in by_image[image["id"]]:
            x, y, width, height = map(float, annotation["bbox"])
            boxes.append((x, y, x + width, y + height))
            labels.append(names.get(annotation.get("category_id"), ""))
            polygons = annotation.get("segmentation")
            polygons = polygons if isinstance(polygons, list) else []  # run lengths: only the box is used
            shapes.append([np.array(p, dtype=np.float32).reshape(-1, 2) for p in polygons if len(p) >= 6])
        size = int(image["width"]), int(image["height"])
        yield AnnotatedImage(image["file_name"], size, boxes, shapes, labels=labels)


def read_voc(source: AnnotationSource, split: str) -> SplitReader:
    """Read Pascal VOC's XML files."""
    listed = source.root / "ImageSets" / "Main" / {"train": "train.txt", "validation": "val.txt"}[split]
    paths = _files(source.annotations or source.root / "Annotations", (".xml",))
    if listed.is_file():
        stems = {line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()}
        paths = [path for path in paths if path.stem in stems]
    images = source.root / "JPEGImages"
    items = _parsed(((path.stem, path) for path in paths), _voc_image)
    return SplitReader(images if images.is_dir() else source.root, items, has_split=listed.is_file())


def _voc_image(stem: str, path: Path) -> AnnotatedImage:
    root = ElementTree.parse(path).getroot()
    size = int(root.findtext("size/width") or 0), int(root.findtext("size/height") or 0)
    boxes, labels = [], []
    for thing in root.iterfind("object"):
        corners = (thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
        x_min, y_min, x_max, y_max = (float(corner or "nan") for corner in corners)
        boxes.append((x_min - 1, y_min - 1, x_max, y_max))  # counted from 1, last pixel included
        labels.append(thing.findtext("name") or "")
    name = root.findtext("filename") or f"{stem}.jpg"
    return AnnotatedImage(name, size if min(size) > 0 else None, boxes, labels=labels)


def read_yolo(source: AnnotationSource, split: str) -> SplitReader:
    """Read YOLO's text files: `class x_centre y_centre width height` or `class x y x y …`, fractions of the image."""
    images, texts = source.root / "images", source.annotations or source.root / "labels"
    folders = {"train": ("train",), "validation": ("val", "valid", "validation")}[split]
    folder = next((name for name in folders if (images / name).is_dir()), "")
    names = (path.relative_to(images) for path in _files(images / folder, IMAGE_SUFFIXES))
    items = _parsed(((name.as_posix(), (texts / name).with_suffix(".txt")) for name in names), _yolo_image)
    return SplitReader(images, items, has_split=bool(folder))


def _yolo_image(name: str, path: Path) -> AnnotatedImage:
    boxes, shapes = [], []
    for _, *values in _rows(path) if path.is_file() else ():
        if len(values) == 4:
            x, y, width, height = values
            boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
            shapes.append([])
        else:
            outline = np.array(values, dtype=np.float32).reshape(-1, 2)
            boxes.append((*outline.min(0).tolist(), *outline.max(0).tolist()))
            shapes.append([outline])
    return AnnotatedImage(name, boxes=boxes, shapes=shapes, relative=True)


def read_masks(source: AnnotationSource, split: str) -> SplitReader:
    """Read images and their masks (white = object), matched by name."""
    images, folder = source.root / "images", source.annotations or source.root / "masks"
    masks = {path.relative_to(folder).with_suffix(""): path for path in _files(folder, IMAGE_SUFFIXES)}

    def parse(name: str, _: Path) -> AnnotatedImage:
        mask = masks.get(Path(name).with_suffix(""))
        if mask is None:
            return AnnotatedImage(name, problem="no mask of that name")
        boxes, size = component_boxes(mask)
        return AnnotatedImage(name, size, boxes, mask=Path(os.path.relpath(mask, images)).as_posix())

    named = ((path.relative_to(images).as_posix(), path) for path in _files(images, IMAGE_SUFFIXES))
    return SplitReader(images, _parsed(named, parse), has_split=False)


def component_boxes(mask: Path) -> tuple[list[tuple[int, int, int, int]], tuple[int, int]]:
    """Return the box of each connected white component of at least 16 pixels, and (width, height) of the mask."""
    import cv2  # part of the training extra

    with Image.open(mask) as file:
        white = (np.asarray(file.convert("L")) >= 128).astype(np.uint8)
    _, _, components, _ = cv2.connectedComponentsWithStats(white, connectivity=8)
    found = components[1:].tolist()  # the first one is the background
    return [(x, y, x + w, y + h) for x, y, w, h, area in found if area >= _MIN_COMPONENT], (white.shape[1], len(white))


READERS: dict[str, Callable[[AnnotationSource, str], SplitReader]] = {
    "open_images": read_open_images,
    "coco": read_coco,
    "voc": read_voc,
    "yolo": read_yolo,
    "masks": read_masks,
}


# ---- files ----


def _parsed(
    named: Iterable[tuple[str, Path]], parse: Callable[[str, Path], AnnotatedImage]
) -> Iterator[AnnotatedImage]:
    """Parse the annotations of each (name, path); those that cannot be read become a `problem`."""
    for name, path in named:
        try:
            yield parse(name, path)
        except UNREADABLE as error:
            yield AnnotatedImage(name, problem=f"{path}: {error}")


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check data.root and data.annotations")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def _boxes(path: Path) -> list[tuple[float, float, float, float]]:
    return [(x_min, y_min, x_max, y_max) for x_min, y_min, x_max, y_max in _rows(path)]


def _rows(path: Path) -> list[list[float]]:
    """Read a text file of numbers."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[float(word) for word in line.split()] for line in lines if line.strip()]

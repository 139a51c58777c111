"""Annotations in the formats that people have, to one index (`ldm.data.box_index`).

    open_images  ROOT/images/{train…,validation,test}/**/ID.jpg with ROOT/bbox/SPLIT/ID.txt (`scripts/read_bbox.py`) or,
                 where those are missing, the CSVs in ROOT/annotations
    coco         instances JSON: boxes, polygons as shapes
    voc          ROOT/Annotations/*.xml, ROOT/JPEGImages, ROOT/ImageSets/Main/{train,val}.txt
    yolo         …/images/**/NAME.jpg with …/labels/**/NAME.txt: boxes, or polygons as shapes
    masks        ROOT/images/NAME.* with ROOT/masks/NAME.png, white = object: one box per separate white part

A format without a division into training and validation is divided by a hash of the images' names, so that images
added later move few of the others.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.box_index import BoxIndex, BoxIndexError, IndexWriter
from ldm.data.read_bbox import ANNOTATIONS, JpegError, find_images, jpeg_size, kept_boxes
from ldm.images import IMAGE_SUFFIXES

VALIDATION_SHARE, LEAST_VALIDATION = 0.05, 8  # of images, where a format has no validation set
logger = logging.getLogger(__name__)

_ORIENTATION = 0x0112  # EXIF tag
_LEAST_PART = 16  # pixels that a separate part of a mask must have to be an object of its own


class Source(NamedTuple):
    """Where annotations are.

    Attributes:
        root: folder of images, or of everything in the format's layout.
        annotations: file or folder; None is the format's own place below the root.
        val_annotations: likewise, of validation; None: see the format.
    """

    root: Path
    annotations: Path | None = None
    val_annotations: Path | None = None


class Annotated(NamedTuple):
    """An image as a reader finds it: `IndexWriter.add`'s arguments, the size None where the annotations lack it.

    `relative` boxes and shapes are shares of width and height. A `problem` is why there are none.
    """

    name: str
    size: tuple[int, int] | None
    boxes: list[tuple[float, float, float, float]]
    shapes: list[list[np.ndarray]] | None = None
    mask: str = ""
    labels: list[str] | None = None
    relative: bool = False
    problem: str = ""


class Reading(NamedTuple):
    """A format's answer for one split.

    Attributes:
        images: the folder that names are relative to.
        items: the annotated images.
        divided: whether they are this split's alone; otherwise they are all, to be divided by hash.
    """

    images: Path
    items: Iterator[Annotated]
    divided: bool


def open_index(kind: str, source: Source, split: str, folder: Path | None = None) -> BoxIndex:
    """The index of a split, written first where it is missing or older than the annotations.

    Of several processes one writes and the others wait. Annotations that are changed inside a folder, without a file
    coming or going, are not noticed: `scripts/inspect_dataset.py --rebuild` writes the index again.

    Args:
        kind: a key of READERS.
        source: where the annotations are.
        split: train or validation (open_images: test, too).
        folder: where indexes are kept; None is ROOT/index.

    Raises:
        BoxIndexError: the annotations cannot be read, or hold no usable box, or the folder is not writable.
    """
    path = index_path(kind, source, split, folder)
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{path.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = annotations_state(kind, source, split)
            if path.is_file():
                index = BoxIndex(path)
                if index.metadata.get("state") == state:
                    return index
            write_index(path, kind, source, split, state=state)
    except OSError as error:
        raise BoxIndexError(
            f"{folder}: cannot keep an index there ({error.strerror}); name another folder with data.index"
        ) from None
    return BoxIndex(path)


def index_path(kind: str, source: Source, split: str, folder: Path | None = None) -> Path:
    """Where `open_index` keeps an index."""
    return (folder or source.root / "index") / f"{kind}-{split}.safetensors"


def annotations_state(kind: str, source: Source, split: str) -> str:
    """Changes when a file of annotations changes or one comes or goes in a folder of them."""
    if kind == "open_images":  # millions of images: their folders are not walked
        csv_path = source.root / "annotations" / ANNOTATIONS[split]
        places = [source.annotations or source.root / "bbox" / split, csv_path]
    else:
        given = [place for place in (source.annotations, source.val_annotations) if place is not None]
        walked = [source.root, *(place for place in given if place.is_dir())]
        folders = (Path(folder) for root in walked for folder, *_ in os.walk(root))
        places = [*given, *(folder for folder in folders if folder.name != "index")]
    stats = [(str(place), place.stat()) for place in places if place.exists()]
    text = json.dumps([[name, stat.st_mtime_ns, stat.st_size] for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def write_index(path: Path, kind: str, source: Source, split: str, *, state: str = "") -> IndexWriter:
    """Read the annotations of one split and write their index.

    Args:
        path: of the index.
        kind: a key of READERS.
        source: where the annotations are.
        split: train or validation (open_images: test, too).
        state: kept with the index, to tell later whether it is still valid.

    Returns:
        The writer, with its counts.

    Raises:
        BoxIndexError: the annotations cannot be read, or hold no usable box.
    """
    if kind not in READERS:
        raise BoxIndexError(
            f"data.kind: got {kind!r}, which holds no annotations; expected one of {', '.join(READERS)}"
        )
    reading = READERS[kind](source, split)
    items = reading.items
    if not reading.divided:
        everything = list(items)
        validation = held_out(item.name for item in everything)
        items = [item for item in everything if (item.name in validation) == (split == "validation")]
    with IndexWriter(path, index_source(kind, reading.images, split, state)) as writer:
        for item in tqdm(items, desc=f"{split}: {kind}", unit=" images"):
            if item.problem:
                logger.warning("%s: %s: left out", item.name, item.problem)
                writer.dropped["annotations that cannot be read"] += 1
                continue
            try:
                size = stored_size(reading.images / item.name, turned=kind == "open_images")
            except JpegError as error:
                writer.dropped[f"images {error}"] += 1
                continue
            if item.size not in (None, size):
                writer.dropped["images of another size than annotated"] += 1
                continue
            boxes, shapes = item.boxes, item.shapes
            if item.relative:
                w, h = size
                boxes = [(a * w, b * h, c * w, d * h) for a, b, c, d in boxes]
                shapes = shapes and [[outline * (w, h) for outline in outlines] for outlines in shapes]
            writer.add(item.name, size, boxes, shapes, item.mask, item.labels)
    return writer


def index_source(kind: str, images: Path, split: str, state: str) -> dict[str, str]:
    """What an index says about its origin."""
    return {"format": kind, "split": split, "images": str(images), "state": state}


def held_out(names: Iterable[str]) -> set[str]:
    """Images of an undivided set that are for validation: 5 %, at least 8, at most a quarter; by hashes of names."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    count = max(round(VALIDATION_SHARE * len(ordered)), LEAST_VALIDATION)
    return set(ordered[: min(count, len(ordered) // 4)])


def stored_size(path: Path, *, turned: bool = False) -> tuple[int, int]:
    """(width, height) of an image file as stored, from its header.

    Args:
        path: of the image.
        turned: whether annotations are known to mean the pixels as stored, whatever the EXIF data say.

    Raises:
        JpegError: it is missing, no image, damaged, or stored turned with a note in its EXIF data, in which case
            nobody knows whether the annotations mean the picture before or after turning.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        size = jpeg_size(path)  # also finds truncated files
        if turned:
            return size
    try:
        with Image.open(path) as image:
            if not turned and image.getexif().get(_ORIENTATION, 1) != 1:
                raise JpegError("stored turned (EXIF orientation); save them upright")
            return image.size
    except JpegError:
        raise
    except FileNotFoundError:
        raise JpegError("missing") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise JpegError("unreadable") from None


# ---- formats ----


def read_open_images(source: Source, split: str) -> Reading:
    """Text files of pixel boxes, or the official CSV."""
    images, texts = source.root / "images", source.annotations or source.root / "bbox" / split
    csv_path = source.annotations or source.root / "annotations" / ANNOTATIONS[split]
    if texts.is_dir():
        marked = _open_images_texts(texts)
    elif csv_path.is_file():
        marked = _open_images_csv(csv_path)
    else:
        raise BoxIndexError(
            f"{texts}: no such folder, and no {csv_path}; dataset/README.md says where the CSVs come from"
        )
    folders = find_images(images, split)
    names = {id_: os.path.relpath(f"{folder}/{id_}.jpg", images) for id_, folder in folders.items()}
    return Reading(images, (item._replace(name=names.get(item.name, item.name)) for item in marked), divided=True)


def _open_images_texts(texts: Path) -> Iterator[Annotated]:
    for path in _files(texts, (".txt",)):
        try:
            boxes = [(a, b, c, d) for a, b, c, d in _lines(path)]
        except ValueError as error:
            yield Annotated(path.stem, None, [], problem=f"{path}: {error}")
            continue
        yield Annotated(path.stem, None, boxes)


def _open_images_csv(csv_path: Path) -> Iterator[Annotated]:
    for id_, corners, labels in kept_boxes(csv_path):
        yield Annotated(id_, None, [(a, b, c, d) for a, b, c, d in corners.tolist()], labels=labels, relative=True)


def read_coco(source: Source, split: str) -> Reading:
    """COCO's instances: `annotations` for training, `val_annotations` for validation, or a share of the former."""
    chosen = source.val_annotations if split == "validation" and source.val_annotations else source.annotations
    if chosen is None:
        raise BoxIndexError("data.annotations: format coco needs the path of a JSON file")
    return Reading(source.root, _coco(chosen), divided=source.val_annotations is not None)


def _coco(path: Path) -> Iterator[Annotated]:
    content = _json(path)
    try:
        names = {category["id"]: str(category["name"]) for category in content.get("categories", [])}
        by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd", 0):
                by_image[annotation["image_id"]].append(annotation)
        for image in content["images"]:
            boxes, shapes, labels = [], [], []
            for annotation in by_image.get(image["id"], []):
                x, y, width, height = map(float, annotation["bbox"])
                boxes.append((x, y, x + width, y + height))
                labels.append(names.get(annotation.get("category_id"), ""))
                polygons = annotation.get("segmentation")
                polygons = polygons if isinstance(polygons, list) else []  # run lengths: the box serves
                shapes.append([np.array(p, dtype=np.float32).reshape(-1, 2) for p in polygons if len(p) >= 6])
            size = int(image["width"]), int(image["height"])
            yield Annotated(image["file_name"], size, boxes, shapes, labels=labels)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BoxIndexError(f"{path}: not COCO instances ({error!r}); expected images, annotations, bbox") from None


def read_voc(source: Source, split: str) -> Reading:
    """Pascal VOC's XML files."""
    folder = source.annotations or source.root / "Annotations"
    listed = source.root / "ImageSets" / "Main" / {"train": "train.txt", "validation": "val.txt"}[split]
    paths = _files(folder, (".xml",))
    if listed.is_file():
        stems = {line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()}
        paths = [path for path in paths if path.stem in stems]
    images = source.root / "JPEGImages"
    return Reading(images if images.is_dir() else source.root, _voc(paths), divided=listed.is_file())


def _voc(paths: list[Path]) -> Iterator[Annotated]:
    for path in paths:
        try:
            root = ElementTree.parse(path).getroot()
            name = root.findtext("filename") or f"{path.stem}.jpg"
            size = int(root.findtext("size/width") or 0), int(root.findtext("size/height") or 0)
            boxes, labels = [], []
            for thing in root.iterfind("object"):
                edges = [f"bndbox/{k}" for k in ("xmin", "ymin", "xmax", "ymax")]
                x_min, y_min, x_max, y_max = (float(thing.findtext(k) or "nan") for k in edges)
                boxes.append((x_min - 1, y_min - 1, x_max, y_max))  # counted from 1, last pixel included
                labels.append(thing.findtext("name") or "")
        except (ElementTree.ParseError, ValueError, OSError) as error:
            yield Annotated(path.stem, None, [], problem=f"{path}: {error}")
            continue
        yield Annotated(name, size if min(size) > 0 else None, boxes, labels=labels)


def read_yolo(source: Source, split: str) -> Reading:
    """YOLO's text files: `class x_centre y_centre width height`, or `class x y x y …`, as shares of the image."""
    images = source.root / "images"
    if not images.is_dir():
        raise BoxIndexError(f"{images}: no such folder; format yolo expects ROOT/images and ROOT/labels")
    labels = source.annotations or source.root / "labels"
    folder = next((f for f in {"train": ["train"], "validation": ["val", "valid", "validation"]}[split]
                   if (images / f).is_dir()), "")  # fmt: skip
    return Reading(images, _yolo(images, labels, folder), divided=bool(folder))


def _yolo(images: Path, labels: Path, folder: str) -> Iterator[Annotated]:
    for path in _files(images / folder, IMAGE_SUFFIXES):
        name = path.relative_to(images)
        text = (labels / name).with_suffix(".txt")
        boxes, shapes = [], []
        try:
            for _, *values in _lines(text) if text.is_file() else ():
                if len(values) == 4:
                    x, y, width, height = values
                    boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
                    shapes.append([])
                else:
                    outline = np.array(values, dtype=np.float32).reshape(-1, 2)
                    boxes.append((*outline.min(0).tolist(), *outline.max(0).tolist()))
                    shapes.append([outline])
        except ValueError as error:
            yield Annotated(name.as_posix(), None, [], problem=f"{text}: {error}")
            continue
        yield Annotated(name.as_posix(), None, boxes, shapes, relative=True)


def read_masks(source: Source, split: str) -> Reading:
    """Images and their masks, white = object, matched by name."""
    images, masks = source.root / "images", source.annotations or source.root / "masks"
    found = {path.relative_to(masks).with_suffix("").as_posix(): path for path in _files(masks, IMAGE_SUFFIXES)}
    return Reading(images, _mask_pairs(images, found), divided=False)


def _mask_pairs(images: Path, masks: dict[str, Path]) -> Iterator[Annotated]:
    import cv2  # part of the training extra

    for path in _files(images, IMAGE_SUFFIXES):
        name = path.relative_to(images)
        mask = masks.get(name.with_suffix("").as_posix())
        if mask is None:
            yield Annotated(name.as_posix(), None, [], problem="no mask of that name")
            continue
        try:
            with Image.open(mask) as file:
                white = (np.asarray(file.convert("L")) >= 128).astype(np.uint8)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            yield Annotated(name.as_posix(), None, [], problem=f"{mask}: {error}")
            continue
        _, _, parts, _ = cv2.connectedComponentsWithStats(white, connectivity=8)
        boxes = [(x, y, x + w, y + h) for x, y, w, h, area in parts[1:].tolist() if area >= _LEAST_PART]
        relative = Path(os.path.relpath(mask, images)).as_posix()
        yield Annotated(name.as_posix(), (white.shape[1], white.shape[0]), boxes, mask=relative)


READERS: dict[str, Callable[[Source, str], Reading]] = {
    "open_images": read_open_images,
    "coco": read_coco,
    "voc": read_voc,
    "yolo": read_yolo,
    "masks": read_masks,
}


# ---- files ----


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        raise BoxIndexError(f"{folder}: no such folder; check data.root and data.annotations")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def _lines(path: Path) -> list[list[float]]:
    text = path.read_text(encoding="utf-8")
    return [[float(word) for word in line.split()] for line in text.splitlines() if line.strip()]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BoxIndexError(f"{path}: no such file; check data.annotations") from None
    except (OSError, ValueError) as error:
        raise BoxIndexError(f"{path}: not JSON ({error}); download or export it again") from None

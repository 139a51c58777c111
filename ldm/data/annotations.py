"""Read box annotations in common formats (docs/data.md), and write the index that training opens."""

import hashlib
import itertools
import json
import logging
import os
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from filelock import FileLock
from PIL import ExifTags, Image
from tqdm import tqdm

from ldm.config import DataConfig
from ldm.data.box_index import MAX_AREA, MIN_AREA, Boxes, BoxIndex, IndexWriter, Labels, Shapes, Size
from ldm.files import UserError
from ldm.images import IMAGE_SUFFIXES, UNREADABLE

OPEN_IMAGES_CSV = {split: f"{split}-annotations-bbox.csv" for split in ("validation", "test")}
OPEN_IMAGES_CSV["train"] = "oidv6-train-annotations-bbox.csv"
VALIDATION_SHARE, MIN_VALIDATION = 0.05, 8  # of the images, where a dataset has no validation split
_CORNERS = ["XMin", "YMin", "XMax", "YMax"]  # columns of Open Images' CSV
_MIN_COMPONENT = 16  # pixels of a mask's connected component that counts as an object
logger = logging.getLogger(__name__)


class AnnotatedImage(NamedTuple):
    """Arguments of `IndexWriter.add`, with fractions of the size if `relative`; or a `problem` in reading them."""

    name: str
    size: Size | None = None  # unknown
    boxes: Boxes | np.ndarray = ()
    shapes: Shapes = None
    mask: str = ""
    labels: Labels = None
    relative: bool = False
    problem: str = ""


Parser = Callable[[str, Path], AnnotatedImage]  # of an image's name and the file of its annotations
Split = tuple[Path, Iterable[AnnotatedImage], bool]  # folder of the images; images; whether only those of the split


def open_index(data: DataConfig, split: str, *, rebuild: bool = False) -> BoxIndex:
    """Open the index of a split; write it first if it is missing, older than the annotations, or with `rebuild`.

    Of several processes one writes and the others wait. A change inside an annotation file of a folder goes unnoticed
    as long as no file is added or removed. UserError if there is no usable box, or a file cannot be read or written.
    """
    path = index_path(data, split)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            state = annotations_state(data, split)
            if not rebuild and path.is_file() and (index := BoxIndex(path)).metadata.get("state") == state:
                return index
            write_index(path, data, split, state=state)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}); name another folder with data.index") from None
    return BoxIndex(path)


def index_path(data: DataConfig, split: str) -> Path:
    """Return the path of the index that `open_index` opens."""
    return Path(data.index or Path(data.root, "index"), f"{data.kind}-{split}.safetensors")


def annotations_state(data: DataConfig, split: str) -> str:
    """Hash times and sizes of the annotations: changes when a file changes, or is added to or removed from a folder."""
    root = Path(data.root)
    if data.kind == "open_images":  # millions of images: their folders are not walked
        places = [Path(data.annotations or root / "bbox" / split), root / "annotations" / OPEN_IMAGES_CSV[split]]
    else:
        named = [Path(place) for place in (data.annotations, data.val_annotations) if place is not None]
        folders = (Path(folder) for place in (root, *named) for folder, *_ in os.walk(place))  # of a file: none
        places = [*named, *(folder for folder in folders if folder.name != "index")]
    stats = [(str(place), place.stat()) for place in places if place.exists()]
    text = json.dumps([[name, stat.st_mtime_ns, stat.st_size] for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def write_index(path: Path, data: DataConfig, split: str, *, state: str = "") -> IndexWriter:
    """Read the annotations of one split and write their index, with `state` to tell later whether it is still valid."""
    if data.kind not in READERS:
        raise UserError(f"data.kind: got {data.kind}, which holds no annotations; expected one of {', '.join(READERS)}")
    images, items, has_split = READERS[data.kind](data, split)
    if not has_split:
        items = list(items)
        validation = held_out(item.name for item in items)
        items = [item for item in items if (item.name in validation) == (split == "validation")]
    with IndexWriter(path, {"format": data.kind, "split": split, "images": str(images), "state": state}) as writer:
        for item in tqdm(items, desc=f"{split}: {data.kind}", unit=" images"):
            if item.problem:
                logger.warning("%s: left out (%s)", item.name, item.problem)
                writer.dropped["annotations that cannot be read"] += 1
                continue
            try:
                size = stored_size(images / item.name, ignore_exif=data.kind == "open_images")
                if item.size not in (None, size):
                    raise UnusableImageError("of another size than annotated")
            except UnusableImageError as error:
                writer.dropped[f"images {error}"] += 1
                continue
            scale = size if item.relative else (1, 1)
            boxes = (np.reshape(item.boxes, (-1, 4)) * (*scale, *scale)).tolist()
            shapes = item.shapes and [[outline * scale for outline in outlines] for outlines in item.shapes]
            writer.add(item.name, size, boxes, shapes, item.mask, item.labels)
    return writer


def held_out(names: Iterable[str]) -> set[str]:
    """Choose by name hash the validation images of a dataset without splits: 5 %, at least 8, at most a quarter."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    count = max(round(VALIDATION_SHARE * len(ordered)), MIN_VALIDATION)
    return set(ordered[: min(count, len(ordered) // 4)])


class UnusableImageError(Exception):
    """An image that training cannot use. Images are counted by the message, a reason in a few words."""


def stored_size(path: str | Path, *, ignore_exif: bool = False) -> tuple[int, int]:
    """Read (width, height) of an image file as stored from its header.

    UnusableImageError if it is missing, damaged or a truncated JPEG, or if EXIF rotates it and `ignore_exif` is false.
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
    except UNREADABLE as error:
        raise UnusableImageError("missing" if isinstance(error, FileNotFoundError) else "unreadable") from None


def read_open_images(data: DataConfig, split: str) -> Split:
    """Read Open Images' text files of pixel boxes, or else the official CSV."""
    images, texts = Path(data.root, "images"), Path(data.annotations or Path(data.root, "bbox", split))
    csv_path = Path(data.annotations or Path(data.root, "annotations", OPEN_IMAGES_CSV[split]))
    paths = find_jpegs(images, split)
    if texts.is_dir():
        named = ((paths.get(text.stem, text.stem), text) for text in _files(texts, (".txt",)))
        items = _parsed(
            named, lambda name, text: AnnotatedImage(name, boxes=[(a, b, c, d) for a, b, c, d in _rows(text)])
        )
    else:
        items = (
            AnnotatedImage(paths.get(id_, id_), boxes=corners, labels=labels, relative=True)
            for id_, corners, labels in read_boxes_csv(csv_path)[2]
        )
    return images, items, True


def find_jpegs(images: Path, split: str) -> dict[str, str]:
    """Map image ids to paths relative to `images`, of every .jpg below `images/SPLIT` and `images/SPLIT_*`."""
    paths: dict[str, str] = {}
    for root in sorted([images / split, *images.glob(f"{split}_*")]):
        for folder, _, names in os.walk(root, followlinks=True):
            prefix = os.path.relpath(folder, images)
            paths.update((name[:-4], f"{prefix}/{name}") for name in names if name.endswith(".jpg"))
    return paths


def read_boxes_csv(csv_path: Path) -> tuple[int, int, Iterator[tuple[str, np.ndarray, list[str]]]]:
    """Read the boxes of Open Images' CSV that cover 2 % to 80 % of their image.

    Returns:
        Numbers of rows and of those boxes; per image its id, (n, 4) corners x_min, y_min, x_max, y_max in [0, 1], and
        the class name of each box, from the class descriptions beside the CSV ("": unknown).
    """
    import pandas as pd  # part of the training extra

    types: Any = {"ImageID": "category", **dict.fromkeys(_CORNERS, "float64")}
    try:
        if "LabelName" in pd.read_csv(csv_path, nrows=0):
            types["LabelName"] = "category"
        boxes = pd.read_csv(csv_path, usecols=list(types), dtype=types)
        lacking = np.flatnonzero(boxes.isna().any(axis=1))
        if boxes.empty or len(lacking):
            raise ValueError("no boxes" if boxes.empty else f"row {lacking[0] + 1} lacks a value")
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        raise UserError(f"{csv_path}: no readable CSV of boxes ({error}); download it, see dataset/README.md") from None
    descriptions: dict[str, str] = {}
    for path in sorted(csv_path.parent.glob("*class-descriptions*.csv")):
        table = pd.read_csv(
            path, header=None, usecols=[0, 1], dtype=str, keep_default_na=False, encoding_errors="replace"
        )
        descriptions |= dict(table.itertuples(index=False))
    area = (boxes.XMax - boxes.XMin) * (boxes.YMax - boxes.YMin)
    boxes["ImageID"] = boxes.ImageID.cat.reorder_categories(boxes.ImageID.cat.categories.sort_values())
    rows, boxes = len(boxes), boxes.loc[area.between(MIN_AREA, MAX_AREA)]  # frees the others
    kept = boxes.sort_values("ImageID", kind="stable")
    codes, corners = kept.ImageID.cat.codes.to_numpy(), kept[_CORNERS].to_numpy()
    labels = kept.LabelName if "LabelName" in kept else pd.Series("", kept.index)
    names = labels.map(lambda label: descriptions.get(label, "")).to_numpy(object)
    starts = np.flatnonzero(np.diff(codes, prepend=-1)).tolist()  # first box of each image
    spans = zip(kept.ImageID.cat.categories[codes[starts]], itertools.pairwise([*starts, len(kept)]), strict=True)
    return rows, len(kept), ((id_, corners[i:j], names[i:j].tolist()) for id_, (i, j) in spans)


def read_coco(data: DataConfig, split: str) -> Split:
    """Read COCO instances: `annotations`, and `val_annotations` for validation if they are named."""
    path = (split == "validation" and data.val_annotations) or data.annotations
    if path is None:
        raise UserError("data.annotations: format coco needs the path of a JSON file")
    by_image, items = defaultdict(list), []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {category["id"]: str(category["name"]) for category in content.get("categories", [])}
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd", 0):
                by_image[annotation["image_id"]].append(annotation)
        for image in content["images"]:
            found = by_image[image["id"]]
            boxes = [(x, y, x + width, y + height) for x, y, width, height in (map(float, a["bbox"]) for a in found)]
            polygons = (a.get("segmentation") for a in found)  # or run lengths, of which only the box is used
            polygons = ([x for x in p if len(x) >= 6] if isinstance(p, list) else [] for p in polygons)
            shapes = [[np.array(x, dtype=np.float32).reshape(-1, 2) for x in outlines] for outlines in polygons]
            labels = [names.get(a.get("category_id"), "") for a in found]
            size = int(image["width"]), int(image["height"])
            items.append(AnnotatedImage(image["file_name"], size, boxes, shapes, labels=labels))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as COCO instances ({error!r}); check data.annotations") from None
    return Path(data.root), items, data.val_annotations is not None


def read_voc(data: DataConfig, split: str) -> Split:
    """Read Pascal VOC's XML files."""
    root, stem = Path(data.root), {"train": "train", "validation": "val"}[split]
    listed, images = root / "ImageSets" / "Main" / f"{stem}.txt", root / "JPEGImages"
    paths = _files(Path(data.annotations or root / "Annotations"), (".xml",))
    if listed.is_file():
        stems = {line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()}
        paths = [path for path in paths if path.stem in stems]
    items = _parsed(((path.stem, path) for path in paths), _voc_image)
    return images if images.is_dir() else root, items, listed.is_file()


def _voc_image(stem: str, path: Path) -> AnnotatedImage:
    root = ElementTree.parse(path).getroot()
    size = int(root.findtext("size/width") or 0), int(root.findtext("size/height") or 0)
    things = root.findall("object")
    keys = ("xmin", "ymin", "xmax", "ymax")  # counted from 1, last pixel included
    corners = [[float(thing.findtext(f"bndbox/{key}") or "nan") for key in keys] for thing in things]
    boxes, labels = np.reshape(corners, (-1, 4)) - (1, 1, 0, 0), [thing.findtext("name") or "" for thing in things]
    name = root.findtext("filename") or f"{stem}.jpg"
    return AnnotatedImage(name, size if min(size) > 0 else None, boxes, labels=labels)


def read_yolo(data: DataConfig, split: str) -> Split:
    """Read YOLO's text files: `class x_centre y_centre width height` or `class x y x y …`, fractions of the image."""
    images, texts = Path(data.root, "images"), Path(data.annotations or Path(data.root, "labels"))
    folders = {"train": ("train",), "validation": ("val", "valid", "validation")}[split]
    folder = next((name for name in folders if (images / name).is_dir()), "")
    names = (path.relative_to(images) for path in _files(images / folder, IMAGE_SUFFIXES))
    items = _parsed(((name.as_posix(), (texts / name).with_suffix(".txt")) for name in names), _yolo_image)
    return images, items, bool(folder)


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


def read_masks(data: DataConfig, split: str) -> Split:
    """Read images and their masks (white = object), matched by name: a box per connected white component."""
    images, folder = Path(data.root, "images"), Path(data.annotations or Path(data.root, "masks"))
    masks = {path.relative_to(folder).with_suffix(""): path for path in _files(folder, IMAGE_SUFFIXES)}

    def parse(name: str, mask: Path) -> AnnotatedImage:
        with Image.open(mask) as file:
            white = (np.asarray(file.convert("L")) >= 128).astype(np.uint8)
        _, _, components, _ = cv2.connectedComponentsWithStats(white, connectivity=8)
        found = components[1:].tolist()  # the first one is the background
        boxes = [(x, y, x + w, y + h) for x, y, w, h, area in found if area >= _MIN_COMPONENT]
        return AnnotatedImage(name, file.size, boxes, mask=Path(os.path.relpath(mask, images)).as_posix())

    names = (path.relative_to(images) for path in _files(images, IMAGE_SUFFIXES))
    named = ((name.as_posix(), masks.get(name.with_suffix(""), folder / name)) for name in names)
    return images, _parsed(named, parse), False


READERS = {"open_images": read_open_images, "coco": read_coco, "voc": read_voc, "yolo": read_yolo, "masks": read_masks}


def _parsed(named: Iterable[tuple[str, Path]], parse: Parser) -> Iterator[AnnotatedImage]:
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


def _rows(path: Path) -> list[list[float]]:
    """Read a text file of numbers."""
    rows = ([float(word) for word in line.split()] for line in path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row]

"""Read box annotations in common formats (docs/data.md), and write the index that training opens."""

import hashlib
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import cv2
import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from ldm.config import DataConfig
from ldm.data import box_index
from ldm.data.box_index import AnnotatedImage, BoxIndex, IndexWriter, Object, Size
from ldm.files import UserError, composed, read_json, read_text, whole
from ldm.images import FORMATS, UNREADABLE, exif_orientation, find_images, load_mask, walk, walk_folders

OPEN_IMAGES_CSV = {split: f"{split}-annotations-bbox.csv" for split in ("validation", "test")}
OPEN_IMAGES_CSV["train"] = "oidv6-train-annotations-bbox.csv"
UNFINISHED = ".unfinished"  # file among Open Images' text files while read_bbox.py writes them
_MIN_COMPONENT = 16  # pixels of a mask's connected component that counts as an object


class Unusable(Exception):
    """An image, or a record of its annotations, that training cannot use, with a reason in a few words."""


_FAULTS = (Unusable, *UNREADABLE, AttributeError, LookupError, TypeError)  # of one image or record
Split = tuple[Path, Iterable[AnnotatedImage], bool]  # folder of the images; images; whether only those of the split
Describe = Callable[[AnnotatedImage, Any], Iterable[tuple[str, Any]]]  # returns the records of objects, with places
Parse = Callable[[Any, str], Object]  # of a record and its place


def open_index(data: DataConfig, split: str, *, rebuild: bool = False) -> BoxIndex:
    """Open the index of a split; write it first if it is missing, older than the annotations, or with `rebuild`.

    Of several processes one writes and the others wait. A change inside a text file of Open Images goes unnoticed.
    UserError if there is no usable box, or a file cannot be read or written.
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
    root, settings = Path(data.root), ["strict"] * data.strict
    if data.kind == "open_images":  # millions of images: their folders are not walked
        places = [Path(data.annotations or root / "bbox" / split), root / "annotations" / OPEN_IMAGES_CSV[split]]
    else:
        named = [Path(place) for place in (data.annotations, data.val_annotations) if place is not None]
        walked = [(Path(folder), names) for place in (root, *named) for folder, names in walk_folders(place)]
        own = index_path(data, split).parent.resolve()
        walked = [(folder, names) for folder, names in walked if folder.resolve() != own]
        # Labelling tools rewrite a file in place, which its folder does not show; of images that would take too long.
        suffixes = ("",) if data.kind == "masks" else (".txt", ".xml")
        files = (folder / name for folder, names in walked for name in names if name.endswith(suffixes))
        places, settings = [*named, *(folder for folder, _ in walked), *files], [data.exif, *settings]
    stats = [(str(place), place.stat()) for place in places if place.exists()]
    text = json.dumps([*([name, stat.st_mtime_ns, stat.st_size] for name, stat in stats), *settings])
    return hashlib.sha256(text.encode()).hexdigest()


def write_index(path: Path, data: DataConfig, split: str, *, state: str = "") -> IndexWriter:
    """Read the annotations of one split and write their index, with `state` to tell later whether it is still valid."""
    if data.kind not in READERS:
        raise UserError(f"data.kind: got {data.kind}, which holds no annotations; expected one of {', '.join(READERS)}")
    writer = IndexWriter(path, {"format": data.kind, "split": split, "state": state}, strict=data.strict)
    images, items, has_split = READERS[data.kind](data, split, writer)
    writer.source["images"] = str(images)
    if not has_split:
        items = list(items)
        validation = held_out(item.name for item in items if item.objects)
        if split == "validation" and not validation:
            raise UserError(f"{images}: too few images with objects to hold one out for validation; add images")
        items = [item for item in items if (item.name in validation) == (split == "validation")]
    exif, fits, undecided = data.exif if data.kind != "open_images" else "ignore", Counter(), []
    for item in tqdm(items, desc=f"{split}: {data.kind}", unit=" images"):
        for reason, place in item.problems:
            writer.left_out.add(reason, place)
        if (item.objects or not item.problems) and not _add(writer, images, item, exif, fits):
            undecided.append(item)
    for item in undecided:
        _add(writer, images, item, "ignore" if fits["ignore"] > fits["apply"] else "apply", fits)
    writer.write()
    return writer


def _add(writer: IndexWriter, images: Path, item: AnnotatedImage, exif: str, fits: Counter[str]) -> bool:
    """Add an image to an index, or count why not; return false if only other images can tell which way up it is.

    With `exif` auto the annotated size decides; `fits` counts the decisions. Where that is unknown or square, or EXIF
    turns the image by 180°, the image is left to the end, when the other images have decided.
    """
    try:
        size, orientation = image_header(images / item.name, ignore_exif=exif == "ignore")
        if orientation != 1 and exif == "skip":
            writer.left_out.add(box_index.SKIPPED_EXIF, item.name)
            return True
        if orientation != 1 and exif == "auto":
            if item.size is None or item.size == size == box_index.turned_size(size, orientation):
                return False
            exif = "ignore" if item.size == size else "apply"
            fits[exif] += 1
        orientation = 1 if exif == "ignore" else orientation
        size = box_index.turned_size(size, orientation)
        if item.size not in (None, size):
            raise Unusable("of another size than annotated")
        item.size, item.orientation = size, orientation
        writer.add(item)
    except Unusable as error:
        writer.left_out.add(f"images {error}", item.name)
    return True


def held_out(names: Iterable[str]) -> set[str]:
    """Choose by name hash what validates a dataset without splits: 5 %, at least 8, at most a quarter or one."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest())
    count = max(round(0.05 * len(ordered)), 8)
    return set(ordered[: min(count, len(ordered) // 4 or len(ordered) // 2)])


def image_header(path: str | Path, *, ignore_exif: bool = False) -> tuple[Size, int]:
    """Read (width, height) as stored and the EXIF orientation, 1 to 8, of an image file from its header.

    The orientation is 1 if it is ignored, and for TIFF, which Pillow turns. Unusable if the file is missing or damaged.
    """
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            size, orientation = image.size, 1 if ignore_exif or image.format == "TIFF" else exif_orientation(image)
            if image.format in ("JPEG", "MPO"):
                file.seek(-min(1024, file.seek(0, os.SEEK_END)), os.SEEK_END)  # padding may follow the end marker
                if b"\xff\xd9" not in file.read():
                    file.seek(0)
                    image.load()  # a film may follow, too; truncated ones are errors here
            return size, orientation
    except FileNotFoundError:
        raise Unusable("missing") from None
    except UNREADABLE as error:
        raise Unusable("truncated" if "truncated" in str(error) else "unreadable") from None


def read_open_images(data: DataConfig, split: str, _: IndexWriter) -> Split:
    """Read Open Images' boxes from the text files of `scripts/read_bbox.py`."""
    images, texts = Path(data.root, "images"), Path(data.annotations or Path(data.root, "bbox", split))
    if not texts.is_dir() or (texts / UNFINISHED).exists():
        state = "an interrupted run left only a part here" if texts.is_dir() else "no such folder"
        raise UserError(f"{texts}: {state}; run scripts/read_bbox.py, see dataset/README.md")
    paths = find_jpegs(images, split)
    named = ((paths.get(text.stem, text.stem), text) for text in _files(texts, ".txt"))
    return images, _parsed(named, lambda _, text: _lines(text), _open_images_object), True


def find_jpegs(images: Path, split: str) -> dict[str, str]:
    """Map image ids to paths relative to `images`, of every JPEG below `images/SPLIT` and `images/SPLIT_*`."""
    paths: dict[str, str] = {}
    for root in sorted([images / split, *images.glob(f"{split}_*")]):
        for folder, names in walk_folders(root):
            prefix = os.path.relpath(folder, images)
            jpegs = (name for name in names if name.lower().endswith((".jpg", ".jpeg")))
            paths.update((name.rpartition(".")[0], f"{prefix}/{name}") for name in jpegs)
    return paths


def _open_images_object(words: list[str], place: str) -> Object:
    left, top, right, bottom, *label = words
    return Object((float(left), float(top), float(right), float(bottom)), " ".join(label), (), place)


def read_coco(data: DataConfig, split: str, writer: IndexWriter) -> Split:
    """Read COCO instances: `annotations`, and `val_annotations` for validation if they are named."""
    path = (split == "validation" and data.val_annotations) or data.annotations
    if path is None:
        raise UserError("data.annotations: format coco needs the path of a JSON file")
    content, root = read_json(path), Path(data.root)
    try:
        images, annotations, categories = content["images"], content["annotations"], content.get("categories") or []
        images, annotations = ([x if isinstance(x, dict) else {} for x in some] for some in (images, annotations))
        names = {_id(category.get("id")): str(category.get("name", "")) for category in categories}
    except (AttributeError, KeyError, TypeError):
        expected = "expected an object with the lists images, annotations and categories"
        raise UserError(f"{path}: no COCO instances, {expected}; check data.annotations") from None
    sharing = Counter(_id(image.get("id")) for image in images)
    found: dict[str, list[tuple[str, Any]]] = {id_: [] for id_ in sharing}
    for number, annotation in enumerate(annotations):
        place = f"annotation {annotation.get('id', number)}"
        if (image_id := _id(annotation.get("image_id"))) in found:
            found[image_id].append((place, annotation))
        else:
            writer.left_out.add("annotations of images that are not listed", place)
    folders = ("train2017", "train") if split == "train" else ("val2017", "val", "valid")
    find = image_finder(root, Path(path).parent, *(root / folder for folder in folders))

    def describe(image: AnnotatedImage, described: dict[str, Any]) -> list[tuple[str, Any]]:
        id_ = _id(described["id"])
        if sharing[id_] > 1:  # of two exports that were joined: nobody knows whose boxes these are
            raise Unusable("images that share an id")
        image.name, image.size = find(image.name), _size(described.get("width"), described.get("height"))
        return found[id_]

    named = ((str(image.get("file_name")), image) for image in images)
    return root, _parsed(named, describe, partial(_coco_object, names)), data.val_annotations is not None


def _coco_object(names: dict[str, str], annotation: dict[str, Any], place: str) -> Object:
    if annotation.get("iscrowd") in (1, "1"):
        raise Unusable(box_index.CROWD)
    if not annotation.get("bbox"):
        raise Unusable("annotations without a box")
    x, y, width, height = map(float, annotation["bbox"])
    outlines = annotation.get("segmentation")
    if not isinstance(outlines, list):  # none, or run lengths, of which only the box is used
        outlines = []
    elif outlines and not isinstance(outlines[0], list):  # a polygon that is not in a list
        outlines = [outlines]
    label = names.get(_id(annotation.get("category_id")), "")
    return Object((x, y, x + width, y + height), label, _outlines(outlines), place)


def _outlines(polygons: Iterable[Sequence[float]]) -> list[np.ndarray]:
    """Return polygons of x, y, x, y, … as arrays (n, 2); those of less than three corners are left out."""
    outlines = [np.array(polygon, dtype=np.float32).reshape(-1, 2) for polygon in polygons if len(polygon) >= 6]
    if not all(np.isfinite(outline).all() for outline in outlines):
        raise Unusable("polygons with corners that are not finite")
    return outlines


def _around(outlines: list[np.ndarray]) -> list[float]:
    """Return the smallest box around polygons."""
    corners = np.concatenate(outlines)
    return [*corners.min(0).tolist(), *corners.max(0).tolist()]


def _id(value: Any) -> str:
    """Return an id as text, the same of 7, 7.0 and "7": tools mix them."""
    try:
        return str(whole(value))
    except (TypeError, ValueError):
        return str(value)


def _size(*sides: Any) -> Size | None:
    """Return an annotated size; None where it is not known, for which tools write nothing, 0 or -1."""
    width, height = (int(text) if (text := _id(side)).isdecimal() else 0 for side in sides)
    return (width, height) if width and height else None


def image_finder(root: Path, *others: Path) -> Callable[[str], str]:
    """Return a function that finds an image file where the tool that wrote its path had it in another folder.

    The path is looked up as written, then without more and more of its first folders, below ROOT, ROOT/images,
    ROOT/JPEGImages and `others`; at last anywhere below ROOT, where one file alone may have the name. The function
    returns a path relative to ROOT; Unusable if there is none.
    """
    places = dict.fromkeys((root, root / "images", root / "JPEGImages", *others))

    @cache
    def by_name() -> dict[str, list[str]]:
        paths: dict[str, list[str]] = defaultdict(list)
        for path in walk(root):
            paths[composed(path.name).casefold()].append(str(path))
        return paths

    def find(written: str) -> str:
        if os.path.isfile(os.path.join(root, written)):
            return written
        path = unquote(urlsplit(written).path if "://" in written else written)
        parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")] or [written]
        paths = (os.path.join(place, *parts[k:]) for k in range(len(parts)) for place in places)
        found = [path for path in paths if os.path.isfile(path)][:1] or by_name()[composed(parts[-1]).casefold()]
        if len(found) != 1:
            state = "whose name several have" if found else "missing"
            raise Unusable(f"images {state} in {', '.join(map(str, places))}, or deeper")
        return Path(os.path.relpath(found[0], root)).as_posix()

    return find


def read_voc(data: DataConfig, split: str, _: IndexWriter) -> Split:
    """Read Pascal VOC's XML files."""
    root, stem = Path(data.root), {"train": "train", "validation": "val"}[split]
    listed, images = root / "ImageSets" / "Main" / f"{stem}.txt", root / "JPEGImages"
    images, folder = images if images.is_dir() else root, Path(data.annotations or root / "Annotations")
    named = [(path.stem, path) for path in _files(folder, ".xml")]
    if listed.is_file():
        stems = {line.split()[0] for line in read_text(listed).splitlines() if line.strip()}
        named = [(stem, path) for stem, path in named if stem in stems]
    find = image_finder(images, root, root / "images", folder)
    by_stem = {path.stem: path.name for path in images.iterdir() if path.suffix not in (".xml", ".txt", ".json")}

    def describe(image: AnnotatedImage, path: Path) -> Iterator[tuple[str, ElementTree.Element]]:
        content = ElementTree.parse(path).getroot()
        image.name = (content.findtext("filename") or "").strip() or f"{path.stem}.jpg"
        if not (images / image.name).is_file():  # without an ending, for instance, or with another one
            image.name = by_stem.get(path.stem) or find(image.name)
        image.size = _size(content.findtext("size/width"), content.findtext("size/height"))
        yield from ((f"{path}, object {k}", thing) for k, thing in enumerate(content.findall("object"), 1))

    return images, _parsed(named, describe, _voc_object), listed.is_file()


def _voc_object(thing: ElementTree.Element, place: str) -> Object:
    corners = [thing.findtext(f"bndbox/{key}") or "" for key in ("xmin", "ymin", "xmax", "ymax")]
    shapes = thing.findall("polygon")
    outlines = _outlines([float(x.text or "") for x in shape.iter() if x.tag[0] in "xy"] for shape in shapes)
    if not all(corners) and not outlines:
        raise Unusable("objects without a box")
    left, top, right, bottom = map(float, corners) if all(corners) else _around(outlines)
    # counted from 1, last pixel included
    return Object((left - 1, top - 1, right, bottom), thing.findtext("name") or "", outlines, place)


def read_yolo(data: DataConfig, split: str, writer: IndexWriter) -> Split:
    """Read YOLO's text files: `class x_centre y_centre width height` or `class x y x y …`, fractions of the image."""
    images, texts = Path(data.root, "images"), Path(data.annotations or Path(data.root, "labels"))
    folders = {"train": ("train",), "validation": ("val", "valid", "validation")}[split]
    folder = next((name for name in folders if (images / name).is_dir()), "")
    names = [path.relative_to(images) for path in find_images(images / folder, writer.left_out)]
    if not texts.is_dir():
        raise UserError(f"{texts}: no such folder; check data.root and data.annotations")

    def describe(image: AnnotatedImage, path: Path) -> list[tuple[str, list[str]]]:
        image.relative = True
        return _lines(path) if path.is_file() else []

    named = ((name.as_posix(), (texts / name).with_suffix(".txt")) for name in names)
    return images, _parsed(named, describe, _yolo_object), bool(folder)


def _yolo_object(words: list[str], place: str) -> Object:
    values = [float(word) for word in words[1:]]  # behind the class, a number or a name
    if len(values) < 4 or (len(values) % 2 and len(values) != 5):
        raise Unusable("lines of neither a box nor the corners of a polygon, separated by spaces")
    if max(map(abs, values[:4])) > 2:  # some tools write coordinates slightly outside
        raise Unusable("lines in pixels instead of fractions of the image")
    if len(values) >= 6:
        outlines = _outlines([values])
        return Object(_around(outlines), "", outlines, place)
    x, y, width, height = values[:4]  # a fifth one is the confidence of a prediction
    return Object((x - width / 2, y - height / 2, x + width / 2, y + height / 2), place=place)


def read_masks(data: DataConfig, split: str, writer: IndexWriter) -> Split:
    """Read images and their masks (white = object), matched by name: a box per connected white component."""
    images, folder = Path(data.root, "images"), Path(data.annotations or Path(data.root, "masks"))
    found = find_images(folder, writer.left_out)
    masks = {composed(path.relative_to(folder).with_suffix("")): path for path in found}

    def describe(image: AnnotatedImage, mask: Path) -> Iterable[tuple[str, Object]]:
        if not mask.is_file():
            raise Unusable("images without a mask")
        levels = np.asarray(load_mask(mask))
        if levels.max() < 128:
            raise Unusable("masks without white (levels from 128 on)")
        image.size, image.mask = levels.shape[::-1], Path(os.path.relpath(mask, images)).as_posix()
        found = cv2.connectedComponentsWithStats((levels >= 128).astype(np.uint8), connectivity=8)[2]
        boxes = found[1:].tolist()  # the first one is the background
        return [("", Object((x, y, x + w, y + h))) for x, y, w, h, area in boxes if area >= _MIN_COMPONENT]

    names = (path.relative_to(images) for path in find_images(images, writer.left_out))
    others = ((name, masks.get(composed(name), folder / name)) for name in names)  # the mask of a.jpg may be a.jpg.png
    named = ((name.as_posix(), masks.get(composed(name.with_suffix("")), other)) for name, other in others)
    return images, _parsed(named, describe, lambda found, _: found), False


READERS = {"open_images": read_open_images, "coco": read_coco, "voc": read_voc, "yolo": read_yolo, "masks": read_masks}


def _parsed(named: Iterable[tuple[str, Any]], describe: Describe, parse: Parse) -> Iterator[AnnotatedImage]:
    """Let `describe` fill in each image, given by name and source, and `parse` make objects of its records."""
    for name, source in named:
        image = AnnotatedImage(name)
        try:
            for place, record in describe(image, source):
                try:
                    image.objects.append(parse(record, place))
                except _FAULTS as error:
                    image.problems.append(_problem(error, place))
        except _FAULTS as error:
            image.problems.append(_problem(error, str(source) if isinstance(source, Path) else name))
        yield image


def _problem(error: Exception, place: str) -> tuple[str, str]:
    known = isinstance(error, Unusable)
    return (str(error), place) if known else ("annotations that cannot be read", f"{place}: {error}")


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check data.root and data.annotations")
    found = ((place, name) for place, names in walk_folders(folder) for name in names if name[0] != ".")
    return sorted(Path(place, name) for place, name in found if name.lower().endswith(suffix))


def _lines(path: Path) -> list[tuple[str, list[str]]]:
    """Read the words of each line that has some, with its place."""
    lines = enumerate(read_text(path).splitlines(), 1)
    return [(f"{path}:{number}", words) for number, line in lines if (words := line.split())]

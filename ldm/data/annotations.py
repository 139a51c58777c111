"""Read box annotations in common formats (docs/data.md), and write the index that training opens."""

import codecs
import hashlib
import itertools
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import cv2
import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from ldm.config import DataConfig
from ldm.data.box_index import (
    CROWD,
    MAX_AREA,
    MIN_AREA,
    SKIPPED_EXIF,
    AnnotatedImage,
    BoxIndex,
    IndexWriter,
    Object,
    Size,
    turned_size,
)
from ldm.files import Skipped, UserError, composed, read_json, read_text, whole
from ldm.images import FORMATS, UNREADABLE, exif_orientation, find_images, load_mask, walk, walk_folders

OPEN_IMAGES_CSV = {split: f"{split}-annotations-bbox.csv" for split in ("validation", "test")}
OPEN_IMAGES_CSV["train"] = "oidv6-train-annotations-bbox.csv"
UNFINISHED = ".unfinished"  # file among Open Images' text files while read_bbox.py writes them
VALIDATION_SHARE, MIN_VALIDATION = 0.05, 8  # of the images, where a dataset has no validation split
_CORNERS = ["XMin", "YMin", "XMax", "YMax"]  # columns of Open Images' CSV
_MIN_COMPONENT = 16  # pixels of a mask's connected component that counts as an object

Record = TypeVar("Record")
Result = TypeVar("Result")


class Unusable(Exception):
    """An image, or a record of its annotations, that training cannot use. The message is a reason in a few words."""


Split = tuple[Path, Iterable[AnnotatedImage], bool]  # folder of the images; images; whether only those of the split


def open_index(data: DataConfig, split: str, *, rebuild: bool = False) -> BoxIndex:
    """Open the index of a split; write it first if it is missing, older than the annotations, or with `rebuild`.

    Of several processes one writes and the others wait. A change inside a text file of Open Images goes unnoticed as
    long as none is added or removed. UserError if there is no usable box, or a file cannot be read or written.
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
        walked = [(Path(folder), names) for place in (root, *named) for folder, names in walk_folders(place)]
        own = index_path(data, split).parent.resolve()
        walked = [(folder, names) for folder, names in walked if folder.resolve() != own]
        # Labelling tools rewrite a file in place, which its folder does not show; of images that would take too long.
        suffixes = ("",) if data.kind == "masks" else (".txt", ".xml")
        files = (folder / name for folder, names in walked for name in names if name.endswith(suffixes))
        places = [*named, *(folder for folder, _ in walked), *files]
    stats = [(str(place), place.stat()) for place in places if place.exists()]
    settings = ([] if data.kind == "open_images" else [data.exif]) + ["strict"] * data.strict
    text = json.dumps([*([name, stat.st_mtime_ns, stat.st_size] for name, stat in stats), *settings])
    return hashlib.sha256(text.encode()).hexdigest()


def write_index(path: Path, data: DataConfig, split: str, *, state: str = "") -> IndexWriter:
    """Read the annotations of one split and write their index, with `state` to tell later whether it is still valid."""
    if data.kind not in READERS:
        raise UserError(f"data.kind: got {data.kind}, which holds no annotations; expected one of {', '.join(READERS)}")
    with IndexWriter(path, {"format": data.kind, "split": split, "state": state}, strict=data.strict) as writer:
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
                writer.leave_out(reason, place)
            if (item.objects or not item.problems) and not _add(writer, images, item, exif, fits):
                undecided.append(item)
        for item in undecided:
            _add(writer, images, item, "ignore" if fits["stored"] > fits["upright"] else "apply", fits)
    return writer


def _add(writer: IndexWriter, images: Path, item: AnnotatedImage, exif: str, fits: Counter[str]) -> bool:
    """Add an image to an index, or count why not; return false if only other images can tell which way up it is.

    With `exif` auto the annotated size decides; `fits` counts the decisions. Where that is unknown or square, or EXIF
    turns the image by 180°, the image is left to the end, when the other images have decided.
    """
    try:
        size, orientation = image_header(images / item.name, ignore_exif=exif == "ignore")
        if orientation != 1:
            upright = turned_size(size, orientation)
            if exif == "skip":
                writer.leave_out(SKIPPED_EXIF, item.name)
                return True
            if exif == "auto" and (item.size is None or item.size == size == upright):
                return False
            is_stored = exif == "auto" and item.size == size
            fits["stored" if is_stored else "upright"] += 1
            size, orientation = (size, 1) if is_stored else (upright, orientation)
        if item.size not in (None, size):
            raise Unusable("of another size than annotated")
        item.size, item.orientation = size, orientation
        writer.add(item)
    except Unusable as error:
        writer.leave_out(f"images {error}", item.name)
    return True


def held_out(names: Iterable[str]) -> set[str]:
    """Choose by name hash the validation images of a dataset without splits: 5 %, at least 8, at most a quarter.

    Of two or three images it is one.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest())
    count = max(round(VALIDATION_SHARE * len(ordered)), MIN_VALIDATION)
    return set(ordered[: min(count, len(ordered) // 4 or len(ordered) // 2)])


def image_header(path: str | Path, *, ignore_exif: bool = False) -> tuple[Size, int]:
    """Read (width, height) as stored and the EXIF orientation, 1 to 8, of an image file from its header.

    The orientation is 1 if it is ignored, and for TIFF, which Pillow turns itself. Unusable if the file is missing,
    damaged or a truncated JPEG.
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
    except Image.DecompressionBombError:
        raise Unusable("of more than 179 million pixels") from None
    except UNREADABLE as error:
        raise Unusable("truncated" if "truncated" in str(error) else "unreadable") from None


def read_open_images(data: DataConfig, split: str, writer: IndexWriter) -> Split:
    """Read Open Images' text files of pixel boxes, or else the official CSV."""
    images, texts = Path(data.root, "images"), Path(data.annotations or Path(data.root, "bbox", split))
    csv_path = Path(data.annotations or Path(data.root, "annotations", OPEN_IMAGES_CSV[split]))
    paths = find_jpegs(images, split)
    if (texts / UNFINISHED).exists():
        raise UserError(f"{texts}: scripts/read_bbox.py was interrupted here; run it again")
    if not texts.is_dir():
        found = read_boxes_csv(csv_path, writer.faults)[2]
        return images, (AnnotatedImage(paths.get(id_, id_), objects=some, relative=True) for id_, some in found), True

    def parse(image: AnnotatedImage, text: Path, _: str) -> None:
        image.objects = _each(image, _lines(text), _open_images_object)

    return images, _parsed(((paths.get(text.stem, text.stem), text) for text in _files(texts, ".txt")), parse), True


def find_jpegs(images: Path, split: str) -> dict[str, str]:
    """Map image ids to paths relative to `images`, of every JPEG below `images/SPLIT` and `images/SPLIT_*`."""
    paths: dict[str, str] = {}
    for root in sorted([images / split, *images.glob(f"{split}_*")]):
        for folder, names in walk_folders(root):
            prefix = os.path.relpath(folder, images)
            jpegs = (name for name in names if name.lower().endswith((".jpg", ".jpeg")))
            paths.update((name.rpartition(".")[0], f"{prefix}/{name}") for name in jpegs)
    return paths


def read_boxes_csv(csv_path: Path, skipped: Skipped) -> tuple[int, int, Iterator[tuple[str, list[Object]]]]:
    """Read the boxes of Open Images' CSV that cover 2 % to 80 % of their image; `skipped` takes damaged rows.

    Returns:
        Numbers of rows and of those boxes; each image's id and objects. Corners are fractions of the image; classes are
        named by the class descriptions beside the CSV.
    """
    import pandas as pd  # part of the training extra

    types: Any = {"ImageID": "category", **dict.fromkeys(_CORNERS, "float64")}
    try:
        read = _csv_reader(csv_path)
        if "LabelName" in read(nrows=0):
            types["LabelName"] = "category"
        try:
            boxes = read(usecols=list(types), dtype=types)
            if pd.api.types.is_numeric_dtype(boxes.ImageID.cat.categories):
                raise ValueError("ids without their zeros")
        except ValueError:  # or text instead of a number: read again, slower, with a gap there
            boxes = read(usecols=list(types), dtype="str").astype({"ImageID": "category"})
            boxes[_CORNERS] = boxes[_CORNERS].apply(pd.to_numeric, errors="coerce")
        lacking = boxes.isna().any(axis=1)
        for row in np.flatnonzero(lacking):
            skipped.add("rows that lack a value or number", f"{csv_path}, row {row + 1}")
        rows, boxes = len(boxes), boxes[~lacking] if lacking.any() else boxes
        if boxes.empty:
            raise ValueError("no boxes")
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        raise UserError(f"{csv_path}: no readable CSV of boxes ({error}); download it, see dataset/README.md") from None
    descriptions: dict[str, str] = {}
    for path in sorted(csv_path.parent.glob("*class-descriptions*.csv")):
        with suppress(pd.errors.EmptyDataError):
            table = _csv_reader(path)(header=None, dtype=str, keep_default_na=False, encoding_errors="replace")
            descriptions |= dict(table.iloc[:, :2].itertuples(index=False)) if table.shape[1] > 1 else {}
    area = (boxes.XMax - boxes.XMin).clip(lower=0) * (boxes.YMax - boxes.YMin)
    boxes["ImageID"] = boxes.ImageID.cat.reorder_categories(boxes.ImageID.cat.categories.sort_values())
    boxes = boxes.loc[area.between(MIN_AREA, MAX_AREA)]  # frees the others
    if boxes.empty:
        share = f"{MIN_AREA:.0%} to {MAX_AREA:.0%}"
        raise UserError(f"{csv_path}: no box covers {share} of its image; corners must be fractions of it, from 0 to 1")
    kept = boxes.sort_values("ImageID", kind="stable")
    codes, corners = kept.ImageID.cat.codes.to_numpy(), kept[_CORNERS].to_numpy()
    labels = kept.LabelName if "LabelName" in kept else pd.Series("", kept.index)
    names = labels.map(lambda label: descriptions.get(label, "")).to_numpy(object)
    starts = np.flatnonzero(np.diff(codes, prepend=-1)).tolist()  # first box of each image
    spans = zip(kept.ImageID.cat.categories[codes[starts]], itertools.pairwise([*starts, len(kept)]), strict=True)
    found = ((id_, map(Object, corners[i:j].tolist(), names[i:j].tolist())) for id_, (i, j) in spans)
    return rows, len(kept), ((id_, list(objects)) for id_, objects in found)


def _csv_reader(path: Path) -> Callable[..., Any]:
    """Return `pandas.read_csv` for a file in UTF-8 or UTF-16, separated by commas, semicolons or tabs."""
    import pandas as pd

    with open(path, "rb") as file:
        head = file.readline()
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    separator = chr(max(b",;\t", key=head.count))
    return partial(pd.read_csv, path, sep=separator, encoding=encoding, skipinitialspace=True)


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
        images, annotations = [image if isinstance(image, dict) else {} for image in images], [*annotations]
        names = {_id(category.get("id")): str(category.get("name", "")) for category in categories}
    except (AttributeError, KeyError, TypeError):
        expected = "expected an object with the lists images, annotations and categories"
        raise UserError(f"{path}: no COCO instances, {expected}; check data.annotations") from None
    sharing = Counter(_id(image.get("id")) for image in images)
    found: dict[str, list[tuple[str, Any]]] = {id_: [] for id_ in sharing}
    for number, annotation in enumerate(annotations):
        known = annotation if isinstance(annotation, dict) else {}
        place = f"annotation {known.get('id', number)}"
        if (image_id := _id(known.get("image_id"))) in found:
            found[image_id].append((place, annotation))
        else:
            writer.leave_out("annotations of images that are not listed", place)
    folders = ("train2017", "train") if split == "train" else ("val2017", "val", "valid")
    find = image_finder(root, Path(path).parent, *(root / folder for folder in folders))

    def parse(image: AnnotatedImage, described: dict[str, Any], _: str) -> None:
        id_ = _id(described["id"])
        if sharing[id_] > 1:  # of two exports that were joined: nobody knows whose boxes these are
            raise Unusable("images that share an id")
        image.name, image.size = find(image.name), _size(described.get("width"), described.get("height"))
        image.objects = _each(image, found[id_], partial(_coco_object, names))

    items = _parsed(((str(image.get("file_name")), image) for image in images), parse)
    return root, items, data.val_annotations is not None


def _coco_object(names: dict[str, str], annotation: dict[str, Any], place: str) -> Object:
    if annotation.get("iscrowd") in (1, "1"):
        raise Unusable(CROWD)
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
    """Return polygons of x, y, x, y, … as arrays (n, 2), without those of less than three corners."""
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
    ROOT/JPEGImages and `others`. Last comes the only file of that name anywhere below ROOT. The function returns a path
    relative to ROOT; Unusable if there is no such file, or several.
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
    folder = Path(data.annotations or root / "Annotations")
    paths = _files(folder, ".xml")
    if listed.is_file():
        stems = {line.split()[0] for line in read_text(listed).splitlines() if line.strip()}
        paths = [path for path in paths if path.stem in stems]
    images = images if images.is_dir() else root
    find = image_finder(images, root, root / "images", folder)
    by_stem = {path.stem: path.name for path in images.iterdir() if path.suffix not in (".xml", ".txt", ".json")}

    def parse(image: AnnotatedImage, path: Path, _: str) -> None:
        content = ElementTree.parse(path).getroot()
        image.name = (content.findtext("filename") or "").strip() or f"{path.stem}.jpg"
        if not (images / image.name).is_file():  # without an ending, for instance, or with another one
            image.name = by_stem.get(path.stem) or find(image.name)
        image.size = _size(content.findtext("size/width"), content.findtext("size/height"))
        things = ((f"{path}, object {k}", thing) for k, thing in enumerate(content.findall("object"), 1))
        image.objects = _each(image, things, _voc_object)

    return images, _parsed(((path.stem, path) for path in paths), parse), listed.is_file()


def _voc_object(thing: ElementTree.Element, place: str) -> Object:
    keys = ("xmin", "ymin", "xmax", "ymax")  # counted from 1, last pixel included
    corners = [thing.findtext(f"bndbox/{key}") or "" for key in keys]
    polygons = thing.findall("polygon")
    outlines = _outlines([float(x.text or "") for x in polygon.iter() if x.tag[0] in "xy"] for polygon in polygons)
    if not all(corners) and not outlines:
        raise Unusable("objects without a box")
    left, top, right, bottom = map(float, corners) if all(corners) else _around(outlines)
    return Object((left - 1, top - 1, right, bottom), thing.findtext("name") or "", outlines, place)


def read_yolo(data: DataConfig, split: str, writer: IndexWriter) -> Split:
    """Read YOLO's text files: `class x_centre y_centre width height` or `class x y x y …`, fractions of the image."""
    images, texts = Path(data.root, "images"), Path(data.annotations or Path(data.root, "labels"))
    folders = {"train": ("train",), "validation": ("val", "valid", "validation")}[split]
    folder = next((name for name in folders if (images / name).is_dir()), "")
    names = [path.relative_to(images) for path in find_images(images / folder, writer.faults)]
    if not texts.is_dir():
        raise UserError(f"{texts}: no such folder; check data.root and data.annotations")

    def parse(image: AnnotatedImage, path: Path, _: str) -> None:
        image.relative = True
        image.objects = _each(image, _lines(path) if path.is_file() else [], _yolo_object)

    named = ((name.as_posix(), (texts / name).with_suffix(".txt")) for name in names)
    return images, _parsed(named, parse), bool(folder)


def _yolo_object(words: list[str], place: str) -> Object:
    values = [float(word) for word in words[1:]]  # behind the class, a number or a name
    if len(values) == 5:
        values = values[:4]  # the fifth one is the confidence of a prediction
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise Unusable("lines of neither a box nor the corners of a polygon, separated by spaces")
    if max(map(abs, values)) > 2:  # some tools write coordinates slightly outside
        raise Unusable("lines in pixels instead of fractions of the image")
    if len(values) == 4:
        x, y, width, height = values
        return Object((x - width / 2, y - height / 2, x + width / 2, y + height / 2), place=place)
    outlines = _outlines([values])
    return Object(_around(outlines), "", outlines, place)


def read_masks(data: DataConfig, split: str, writer: IndexWriter) -> Split:
    """Read images and their masks (white = object), matched by name: a box per connected white component."""
    images, folder = Path(data.root, "images"), Path(data.annotations or Path(data.root, "masks"))
    found = find_images(folder, writer.faults)
    masks = {composed(path.relative_to(folder).with_suffix("")): path for path in found}

    def parse(image: AnnotatedImage, mask: Path, _: str) -> None:
        if not mask.is_file():
            raise Unusable("images without a mask")
        levels = np.asarray(load_mask(mask))
        if levels.max() < 128:
            raise Unusable("masks without white (levels from 128 on)")
        found = cv2.connectedComponentsWithStats((levels >= 128).astype(np.uint8), connectivity=8)[2]
        boxes = found[1:].tolist()  # the first one is the background
        image.objects = [Object((x, y, x + w, y + h)) for x, y, w, h, area in boxes if area >= _MIN_COMPONENT]
        image.size = levels.shape[1], levels.shape[0]
        image.mask = Path(os.path.relpath(mask, images)).as_posix()

    names = (path.relative_to(images) for path in find_images(images, writer.faults))
    others = ((name, masks.get(composed(name), folder / name)) for name in names)  # the mask of a.jpg may be a.jpg.png
    named = ((name.as_posix(), masks.get(composed(name.with_suffix("")), other)) for name, other in others)
    return images, _parsed(named, parse), False


READERS = {"open_images": read_open_images, "coco": read_coco, "voc": read_voc, "yolo": read_yolo, "masks": read_masks}


def _parsed(
    named: Iterable[tuple[str, Record]], parse: Callable[[AnnotatedImage, Record, str], None]
) -> Iterator[AnnotatedImage]:
    """Let `parse` fill in each image, given by its name and its path or content."""
    for name, source in named:
        image = AnnotatedImage(name)
        place = str(source) if isinstance(source, Path) else name
        _each(image, [(place, source)], partial(parse, image))
        yield image


def _each(
    image: AnnotatedImage, records: Iterable[tuple[str, Record]], parse: Callable[[Record, str], Result]
) -> list[Result]:
    """Parse each record, given with its place, for itself; what cannot be used becomes a problem of the image."""
    found = []
    for place, record in records:
        try:
            found.append(parse(record, place))
        except Unusable as error:
            image.problems.append((str(error), place))
        except (*UNREADABLE, AttributeError, LookupError, TypeError) as error:
            image.problems.append(("annotations that cannot be read", f"{place}: {error}"))
    return found


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check data.root and data.annotations")
    found = ((place, name) for place, names in walk_folders(folder) for name in names if name[0] != ".")
    return sorted(Path(place, name) for place, name in found if name.lower().endswith(suffix))


def _lines(path: Path) -> list[tuple[str, list[str]]]:
    """Read the words of each line that has some, with its place."""
    lines = enumerate(read_text(path).splitlines(), 1)
    return [(f"{path}:{number}", words) for number, line in lines if (words := line.split())]

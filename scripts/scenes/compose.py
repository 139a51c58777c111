"""Compose training scenes from cut-outs and photographs, in the layout of Open Images; see docs/compose.md.

The recipe is self-supervised: it needs only images with boxes, and images of one's own products serve as well as Open
Images. `compose_scene` pastes one scene; `compose_dataset` writes `images/{train,validation,test}`, annotations in
OIDv6's format, the same with outlines in COCO's, and a benchmark in COCOEE's layout.

Cut-outs and photographs are held out by file: train and validation never show what test and benchmark show.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from io import BytesIO, StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps, UnidentifiedImageError
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout without installing it

from ldm.files import UserError, atomic_write

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
CLASS_FILE = "oidv6-class-descriptions.csv"
BOX_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)

_RECIPE = 1  # part of the settings: raise it when the same settings give other scenes
_CHUNK = 100  # scenes per unit of work; an interrupted run loses at most one per worker
_VISIBLE = 51  # of 255: alpha from which a pixel belongs to the object
_CACHE_SIZE = 400  # images held in memory per worker

Box = tuple[int, int, int, int]  # x_min, y_min, x_max, y_max; pixels, the maximum is exclusive


@dataclass(frozen=True)
class SceneSettings:
    """Settings that decide, together with the images, what a dataset contains."""

    count: int  # scenes in train
    size: int  # pixels, side of the square scenes
    seed: int = 0
    bench: int = 0  # items in the benchmark
    bench_size: int | None = None  # pixels, side of the benchmark's scenes; None: `size`
    validation_share: float = 0.02  # scenes in validation, and in test, per scene in train
    holdout: float = 0.15  # share of cut-outs that only test and benchmark show
    background_holdout: float = 0.12
    hue_jitter: float = 0.0  # largest hue shift in turns, up to 0.5
    hue_jitter_share: float = 0.5  # probability that an object in train and validation is recoloured
    extra_share: float = 0.0  # probability that an object in train comes from the extra cut-outs
    patch_share: float = 0.0  # probability that an object in train is a random piece of a photograph
    objects: tuple[str, ...] = ()  # the only cut-outs, in every split; (): divided by the hold-out

    def __post_init__(self) -> None:
        for name, low, high in (
            ("count", 1, 10**7),
            ("size", 16, 2048),
            ("bench_size", 16, 2048),
            ("seed", 0, 2**63),
            ("bench", 0, 10**6),
            ("hue_jitter", 0.0, 0.5),
            ("hue_jitter_share", 0.0, 1.0),
            ("extra_share", 0.0, 1.0),
            ("patch_share", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')}: got {value}, expected {low} to {high}")
        if self.extra_share + self.patch_share > 1:
            raise UserError(
                f"--extra-share and --patch-share: got {self.extra_share} and {self.patch_share}, "
                "expected a sum of at most 1"
            )

    def scenes_in(self, split: str) -> int:
        return self.count if split == "train" else max(8, round(self.count * self.validation_share))


@dataclass(frozen=True)
class PastedObject:
    """The visible part of a cut-out in a finished scene."""

    name: str
    box: Box
    occluded: bool
    outlines: tuple[tuple[int, ...], ...]  # polygons around its parts: x, y, x, y, … of pixels on their edges


@dataclass(frozen=True)
class Scene:
    """A composed image (RGB) and its objects, the main one first."""

    image: Image.Image
    objects: list[PastedObject]


@dataclass(frozen=True)
class Pictures:
    """Usable image files of one folder, by names relative to it, divided into training and held-out ones."""

    root: Path
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    distinct: tuple[str, ...]  # the held-out ones without look-alikes

    def of(self, split: str) -> tuple[str, ...]:
        return self.train if split in ("train", "validation") else self.held_out

    def only(self, names: tuple[str, ...]) -> Pictures:
        """Return only the named images, for training and for test; UserError if one is missing."""
        if unknown := sorted(set(names) - set(self.train) - set(self.held_out)):
            raise UserError(f"--objects: {', '.join(unknown)}: no usable image of that name in {self.root}")
        return Pictures(self.root, train=names, held_out=names, distinct=names)


# --- one scene -------------------------------------------------------------------------------------------


def compose_scene(
    rng: np.random.Generator,
    cutouts: Sequence[tuple[str, Image.Image]],
    background: Image.Image,
    size: int,
    *,
    hue_jitter: float = 0.0,
    hue_jitter_share: float = 0.5,
    max_overlap: float = 0.2,
) -> Scene:
    """Paste cut-outs on a photograph.

    Works at two to four times the size and scales down, so that edges are antialiased as a camera's are.

    Args:
        rng: the scene's own generator; equal states give equal scenes.
        cutouts: names and RGBA images; the first is the main object and is always there, the others
            are left out where there is no room for them.
        background: RGB photograph; a random square of it is used.
        size: side of the scene in pixels.
        hue_jitter: largest hue shift in turns, 0 to 0.5; saturation moves along with it.
        hue_jitter_share: probability of such a shift, per object.
        max_overlap: share of an earlier object's box that later objects may cover, 0 to 1.
    """
    side = size * _oversampling(size)
    canvas = _random_crop(rng, background, side)
    placed: list[tuple[str, Image.Image, Box]] = []  # full-canvas alphas, in pasting order
    for index, (name, cutout) in enumerate(cutouts):
        extent = rng.uniform(0.25, 0.75) if index == 0 else rng.uniform(0.15, 0.4)
        jitter = hue_jitter if rng.random() < hue_jitter_share else 0.0
        sprite = _random_view(rng, cutout, extent, side, jitter)
        box = _find_place(rng, sprite.size, side, [box for _, _, box in placed], max_overlap)
        if box is None:
            continue
        canvas, alpha = _paste(rng, canvas, sprite, box)
        placed.append((name, alpha, box))

    objects = []
    for index, (name, alpha, _) in enumerate(placed):
        visible = alpha
        for _, later, _ in placed[index + 1 :]:
            visible = ImageChops.multiply(visible, ImageChops.invert(later))
        whole, seen = (np.asarray(_shrink(mask, size)) >= _VISIBLE for mask in (alpha, visible))
        if box := _extent(seen):
            objects.append(PastedObject(name, box, bool(seen.sum() < 0.97 * whole.sum()), _outlines(seen)))
    return Scene(_shrink(canvas, size), objects)


def photo_patch(rng: np.random.Generator, photograph: Image.Image) -> Image.Image:
    """A random piece of a photograph as a cut-out: a smooth closed outline around whatever was there.

    No object, but endless kinds of colour and texture, which teach how an exemplar's look is carried over.

    Args:
        photograph: RGB.

    Returns:
        RGBA, an eighth to a half of the photograph's short side on its long side, opaque inside its outline.
    """
    longer = min(photograph.size) * rng.uniform(0.125, 0.5)
    width, height = (max(16, round(longer * ratio)) for ratio in rng.permutation([1.0, rng.uniform(0.4, 1.0)]))
    left, top = int(rng.integers(0, photograph.width - width + 1)), int(rng.integers(0, photograph.height - height + 1))
    patch = photograph.crop((left, top, left + width, top + height)).convert("RGBA")
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle, radius = np.arctan2(y, x), np.ones_like(x)
    for frequency in range(2, 6):
        radius += rng.normal(0, 0.3 / frequency) * np.cos(frequency * angle + rng.uniform(0, 2 * np.pi))
    inside = np.hypot(x, y) <= np.clip(radius / radius.max(), 0.3, 1.0)
    patch.putalpha(Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)))
    return patch


def _oversampling(size: int) -> int:
    return 4 if size <= 128 else 2


def _shrink(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BOX)  # whole factor: the box filter is the exact mean


def _random_crop(rng: np.random.Generator, background: Image.Image, side: int) -> Image.Image:
    """A random square (50 % to 100 % of the short side), flipped half of the time, resized to side × side."""
    crop = min(background.size) * rng.uniform(0.5, 1.0)
    left, top = rng.uniform(0, background.width - crop), rng.uniform(0, background.height - crop)
    image = background.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + crop, top + crop))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _random_view(
    rng: np.random.Generator, cutout: Image.Image, extent: float, side: int, hue_jitter: float
) -> Image.Image:
    """Recolour, flip, rotate by up to 15° and trim a cut-out; its long side becomes `extent` of the scene's side."""
    if hue_jitter > 0:
        cutout = _shift_hue(cutout, rng.uniform(-hue_jitter, hue_jitter), rng.uniform(0.8, 1.3))
    if rng.random() < 0.5:
        cutout = ImageOps.mirror(cutout)
    view = cutout.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    view = view.crop(view.getchannel("A").getbbox())
    # Thin objects are shown larger: boxes under 2 % of the scene are not trained on.
    extent = max(extent, min(0.9, (0.03 * max(view.size) / min(view.size)) ** 0.5))
    scale = extent * side / max(view.size)
    size = max(1, round(view.width * scale)), max(1, round(view.height * scale))
    return view.resize(size, Image.Resampling.BICUBIC)


def _shift_hue(cutout: Image.Image, turns: float, saturation: float) -> Image.Image:
    hue, colour, value = cutout.convert("RGB").convert("HSV").split()
    hue = hue.point([round(level + 256 * turns) % 256 for level in range(256)])
    colour = colour.point([min(255, round(level * saturation)) for level in range(256)])
    shifted = Image.merge("HSV", (hue, colour, value)).convert("RGB")
    shifted.putalpha(cutout.getchannel("A"))
    return shifted


def _find_place(
    rng: np.random.Generator, size: tuple[int, int], side: int, taken: Sequence[Box], max_overlap: float
) -> Box | None:
    """Draw a place inside the scene where at most `max_overlap` of each earlier box gets covered."""
    for _ in range(20):
        left, top = (int(rng.integers(0, side - length + 1)) for length in size)
        box = (left, top, left + size[0], top + size[1])
        if all(_covered(earlier, box) <= max_overlap for earlier in taken):
            return box
    return None


def _covered(box: Box, by: Box) -> float:
    """Return the fraction of `box` that lies in `by`."""
    width = min(box[2], by[2]) - max(box[0], by[0])
    height = min(box[3], by[3]) - max(box[1], by[1])
    return max(0, width) * max(0, height) / ((box[2] - box[0]) * (box[3] - box[1]))


def _paste(
    rng: np.random.Generator, canvas: Image.Image, sprite: Image.Image, box: Box
) -> tuple[Image.Image, Image.Image]:
    """Paste with shadow, matched brightness and soft edge; return the new canvas and the object's alpha on it."""
    sprite_alpha = sprite.getchannel("A")
    alpha = Image.new("L", canvas.size)
    alpha.paste(sprite_alpha, box[:2])
    # Only ever softened inwards: the colour under a cut-out's transparent pixels is arbitrary.
    alpha = ImageChops.darker(alpha, alpha.filter(ImageFilter.GaussianBlur(canvas.width / 250)))

    around = np.asarray(canvas.crop(box).convert("L"), dtype=np.float32).mean() + 16
    own = np.asarray(sprite.convert("L"), dtype=np.float32)
    opaque = np.asarray(sprite_alpha) >= 128
    gain = float(np.clip((around / (own[opaque].mean() + 16 if opaque.any() else around)) ** 0.25, 0.75, 1.25))
    matched = sprite.convert("RGB").point([min(255, round(level * gain)) for level in range(256)] * 3)

    reach = max(sprite.size)
    shift = round(rng.uniform(-0.06, 0.06) * reach), round(rng.uniform(0.0, 0.06) * reach)
    shadow = Image.new("L", canvas.size)
    shadow.paste(sprite_alpha, (box[0] + shift[0], box[1] + shift[1]))
    shadow = shadow.filter(ImageFilter.GaussianBlur(0.04 * reach))
    opacity = rng.uniform(0.2, 0.5)
    canvas = Image.composite(
        Image.new("RGB", canvas.size), canvas, shadow.point([round(v * opacity) for v in range(256)])
    )

    layer = canvas.copy()
    layer.paste(matched, box[:2])
    return Image.composite(layer, canvas, alpha), alpha


def _extent(mask: np.ndarray) -> Box | None:
    """Return the box around the true pixels, or None if it is under 2 px wide or high."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if len(columns) < 2 or len(rows) < 2:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _outlines(mask: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Return polygons around the connected parts of the true pixels, holes included; specks have none."""
    import cv2

    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return tuple(tuple(map(int, contour.ravel())) for contour in contours if len(contour) >= 3)


# --- the images ----------------------------------------------------------------------------------------


def find_pictures(root: Path, kind: str, holdout: float) -> tuple[Pictures, list[str]]:
    """Check every image in a folder and divide them into training and held-out ones.

    Which images are held out depends on their names only, not on a seed: two datasets from the same
    folder never train on each other's bench. Pictures that look alike (copies, mirrored copies) stay together.

    Args:
        kind: `cutouts` (need transparency) or `backgrounds`.
        holdout: share of the images to hold out, at least one.

    Returns:
        The pictures, and a line for each file that cannot be used.

    Raises:
        UserError: fewer than two usable pictures.
    """
    names, looks, skipped = _usable(root, kind)
    groups: dict[int, list[str]] = {}
    for name, leader in zip(names, group_alike(np.stack(looks)), strict=True):
        groups.setdefault(leader, []).append(name)
    held_out: set[str] = set()
    for leader in sorted(groups, key=lambda leader: hashlib.sha256(names[leader].encode()).digest()):
        if len(held_out) >= max(1, round(holdout * len(names))) or len(held_out | set(groups[leader])) == len(names):
            break
        held_out.update(groups[leader])
    if not held_out:
        raise UserError(f"{root}: all {kind} look alike, so that none can be held out; add different ones")
    train = tuple(name for name in names if name not in held_out)
    distinct = tuple(sorted(names[leader] for leader in groups if names[leader] in held_out))
    return Pictures(root, train, tuple(sorted(held_out)), distinct), skipped


def _usable(root: Path, kind: str) -> tuple[list[str], list[np.ndarray], list[str]]:
    """Return names and thumbnails of the usable images in a folder, and a line for each file that cannot be used."""
    from ldm.images import find_images  # loads torch, which the workers do not need

    try:
        paths = find_images(root)
    except UserError as error:
        raise UserError(f"{error}; --{kind} names a folder of images") from None
    names, looks, skipped = [], [], []
    for path in tqdm(paths, desc=f"checking {kind}", unit=" files", leave=False):
        try:
            image = _load_background(path, 64) if kind == "backgrounds" else _load_cutout(path, 64)
        except UserError as error:
            skipped.append(str(error))
            continue
        names.append(path.relative_to(root).as_posix())
        looks.append(look(image))
    if len(names) < 2:
        reason = skipped[0] if skipped else "only one image"
        raise UserError(f"{root}: got {len(names)} usable {kind} of {len(paths)} files, expected at least 2; {reason}")
    return names, looks, skipped


def look(image: Image.Image) -> np.ndarray:
    """Return a 16 × 16 thumbnail on grey as a vector, trimmed to the object."""
    if image.mode == "RGBA":
        image = image.crop(image.getchannel("A").getbbox())
        image = Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image)
    return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=np.float32)


def group_alike(looks: np.ndarray, tolerance: float = 6.0) -> list[int]:
    """Return, for each image, the first one that it resembles (mean difference in levels, mirrored or not)."""
    flat, mirrored = looks.reshape(len(looks), -1), looks[:, :, ::-1].reshape(len(looks), -1)
    leaders = list(range(len(looks)))
    for index in range(len(looks)):
        for candidates in (flat, mirrored):
            alike = np.flatnonzero(np.abs(candidates[:index] - flat[index]).mean(axis=1) < tolerance)
            if len(alike):
                leaders[index] = min(leaders[index], leaders[alike[0]])
    return leaders


def _for_scenes(cutouts: Pictures, name: str, size: int) -> Image.Image:
    """Return a cut-out as large as scenes of `size` pixels can use it."""
    return _load_cutout(cutouts.root / name, size * _oversampling(size))


@lru_cache(maxsize=_CACHE_SIZE)
def _load_cutout(path: Path, max_side: int) -> Image.Image:
    """Read a cut-out as RGBA, trimmed to its opaque part, at most `max_side` pixels on the long side."""
    image = _open(path)
    if "A" not in image.getbands() and "transparency" not in image.info:
        raise UserError(f"{path}: got an image without alpha channel, expected a cut-out with transparency")
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    low, high = alpha.getextrema()
    assert isinstance(low, int) and isinstance(high, int)  # one channel
    if high < 128 or low > 127:
        state = "transparent" if high < 128 else "opaque"
        raise UserError(f"{path}: got an image that is {state} all over, expected a cut-out with transparency")
    image = image.crop(alpha.point([255 * (level > 8) for level in range(256)]).getbbox())
    if min(image.size) < max(image.size) / 25:
        raise UserError(f"{path}: got an object of {image.width}×{image.height} pixels, too thin for a scene")
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return image


@lru_cache(maxsize=_CACHE_SIZE)
def _load_background(path: Path, min_side: int) -> Image.Image:
    """Read a photograph as RGB, scaled down to `min_side` pixels on the short side if it is larger."""
    image = _open(path, min_side)
    image = ImageOps.exif_transpose(image).convert("RGB")
    scale = min_side / min(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return image


def _open(path: Path, draft_side: int | None = None) -> Image.Image:
    """Read an image; a JPEG at a reduced scale of at least `draft_side` pixels where that is enough."""
    try:
        with Image.open(path) as image:
            if draft_side is not None:
                image.draft("RGB", (draft_side, draft_side))
            image.load()
            return image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error}); replace or remove it") from error


# --- the dataset -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Everything that a worker needs; small enough to be sent with every chunk."""

    settings: SceneSettings
    cutouts: Pictures
    backgrounds: Pictures
    extras: Pictures | None  # shown in train only, all of them
    out: Path
    digest: str

    def generator(self, part: str, index: int) -> np.random.Generator:
        """Return the random generator of one scene, which depends on seed, part and index alone."""
        return np.random.default_rng([self.settings.seed, _PARTS.index(part), index])

    def cutout(self, name: str, size: int) -> tuple[str, Image.Image]:
        return name, _for_scenes(self.cutouts, name, size)

    def training_object(self, rng: np.random.Generator, name: str) -> tuple[str, Image.Image]:
        """Return the cut-out `name`, or by the settings' shares an extra one or a piece of a photograph."""
        settings, u = self.settings, rng.random()
        if u < settings.patch_share:
            (photograph,) = _draw_names(rng, self.backgrounds.train, 1)
            return f"patch/{photograph}", photo_patch(rng, self.background(photograph, settings.size))
        if self.extras is not None and u < settings.patch_share + settings.extra_share:
            (extra,) = _draw_names(rng, self.extras.train, 1)
            return f"extra/{extra}", _for_scenes(self.extras, extra, settings.size)
        return self.cutout(name, settings.size)

    def background(self, name: str, size: int) -> Image.Image:
        return _load_background(self.backgrounds.root / name, 2 * size * _oversampling(size))

    def part_file(self, part: str, start: int) -> Path:
        return self.out / ".parts" / f"{part}-{start:08d}.jsonl"


_PARTS = (*SPLITS, "bench")
_MADE_HERE = ("images", "annotations", "bench", "bbox", ".parts", "LICENSES.md", "settings.json")


def compose_dataset(
    cutouts_dir: Path,
    backgrounds_dir: Path,
    out: Path,
    settings: SceneSettings,
    *,
    extras_dir: Path | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> None:
    """Write a whole dataset. An interrupted one is continued, a finished one left alone.

    `out/images/SPLIT/ID.jpg`, `out/annotations/*.csv` (OIDv6 columns) and `SPLIT.json` (COCO instances), `out/bench/`
    (COCOEE layout, plus `items.csv`: which item shows which cut-out), `out/settings.json`, `out/LICENSES.md`.

    Args:
        extras_dir: more cut-outs, of any style, that train alone shows; needed where `settings.extra_share` is not 0.
        workers: processes; the result does not depend on it.
        overwrite: replace a dataset that was made with other settings or pictures.

    Raises:
        UserError: unusable folders, or `out` holds something else.
    """
    cutouts, skipped = find_pictures(cutouts_dir, "cutouts", settings.holdout)
    if settings.objects:
        cutouts = cutouts.only(settings.objects)
    backgrounds, unread = find_pictures(backgrounds_dir, "backgrounds", settings.background_holdout)
    extras, unusable = None, []
    if settings.extra_share > 0:
        if extras_dir is None:
            raise UserError("--extra-share: needs --extra-cutouts, a folder of more cut-outs")
        names, _, unusable = _usable(extras_dir, "extra-cutouts")
        extras = Pictures(extras_dir, train=tuple(names), held_out=(), distinct=())
    for line in (*skipped, *unread, *unusable):
        logger.warning("skipped: %s", line)
    record = {
        "recipe": _RECIPE,
        **{key: value for key, value in asdict(settings).items() if key != "objects"},
        **({"objects": list(settings.objects)} if settings.objects else {}),
        "cutouts": _fingerprint(cutouts),
        "backgrounds": _fingerprint(backgrounds),
        "extras": extras and _fingerprint(extras),
    }
    _claim(out, record, overwrite)
    held_out = {"held_out_cutouts": cutouts.held_out, "held_out_backgrounds": backgrounds.held_out}
    write_file(out / "settings.json", json.dumps({"settings": record, **held_out}, indent=1).encode())
    _write_licences(out, (cutouts_dir, backgrounds_dir, *([extras_dir] if extras and extras_dir else [])))

    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    plan = _Plan(settings, cutouts, backgrounds, extras, out, digest)
    _write_classes(plan)
    for folder in (out / ".parts", *(out / "images" / split for split in SPLITS)):
        folder.mkdir(parents=True, exist_ok=True)
    totals = {split: settings.scenes_in(split) for split in SPLITS} | {"bench": settings.bench}
    pending = {part: total for part, total in totals.items() if not _result_file(plan, part).is_file()}
    jobs = [
        (part, start, min(start + _CHUNK, total))
        for part, total in pending.items()
        for start in range(0, total, _CHUNK)
    ]
    _run_jobs(plan, [job for job in jobs if not plan.part_file(job[0], job[1]).is_file()], workers)
    for part, total in pending.items():
        if total:
            _join_parts(plan, part, range(0, total, _CHUNK))
    shutil.rmtree(out / ".parts")


def _run_jobs(plan: _Plan, jobs: list[tuple[str, int, int]], workers: int) -> None:
    total = sum(stop - start for _, start, stop in jobs)
    with (
        tqdm(total=total, desc="composing", unit=" scenes") as bar,
        _worker_pool(workers) if workers > 1 else nullcontext() as pool,
    ):
        for done in (pool.map if pool else map)(partial(_compose_chunk, plan), jobs):
            bar.update(done)


def _worker_pool(workers: int) -> ProcessPoolExecutor:
    # Ctrl-C is for the main process: workers finish their chunk, the rest is cancelled.
    return ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))


def _compose_chunk(plan: _Plan, job: tuple[str, int, int]) -> int:
    """Write the scenes of a chunk, then their rows: a chunk whose rows exist is complete."""
    part, start, stop = job
    rows: list[str] = []
    for index in range(start, stop):
        written = _write_bench_item(plan, index) if part == "bench" else _write_scene(plan, part, index)
        rows += (json.dumps(row) for row in written)
    write_file(plan.part_file(part, start), "".join(f"{row}\n" for row in rows).encode())
    return stop - start


def _write_scene(plan: _Plan, split: str, index: int) -> Iterator[tuple[object, ...]]:
    """Compose and save one scene; yield its annotation rows, with the outlines last."""
    settings, rng = plan.settings, plan.generator(split, index)
    names = _draw_names(rng, plan.cutouts.of(split), int(rng.integers(1, 4)))
    (background,) = _draw_names(rng, plan.backgrounds.of(split), 1)
    mixed = split == "train" and settings.extra_share + settings.patch_share > 0
    scene = compose_scene(
        rng,
        [plan.training_object(rng, name) if mixed else plan.cutout(name, settings.size) for name in names],
        plan.background(background, settings.size),
        settings.size,
        hue_jitter=settings.hue_jitter if split != "test" else 0.0,
        hue_jitter_share=settings.hue_jitter_share,
    )
    image_id = hashlib.sha256(f"{plan.digest}/{split}/{index}".encode()).hexdigest()[:16]
    save_picture(scene.image, plan.out / "images" / split / f"{image_id}.jpg", quality=95, subsampling=0)
    for shown in scene.objects:
        x_min, y_min, x_max, y_max = (f"{edge / settings.size:.6f}" for edge in shown.box)
        edges, flags = (x_min, x_max, y_min, y_max), (int(shown.occluded), 0, 0, 0, 0)
        yield image_id, "composed", _label(shown.name), 1, *edges, *flags, shown.outlines


def _write_bench_item(plan: _Plan, index: int) -> Iterator[tuple[object, ...]]:
    """Write one benchmark item: scene, hole around its main object, and another view of that object as exemplar."""
    size, rng = plan.settings.bench_size or plan.settings.size, plan.generator("bench", index)
    names = plan.cutouts.distinct  # an edit is compared with other items' exemplars: none may be its twin
    main = names[index % len(names)]
    others = [name for name in names if name != main]
    scenery = _draw_names(rng, plan.backgrounds.held_out, 2)
    scene = _main_visible(
        partial(
            compose_scene,
            rng,
            [plan.cutout(name, size) for name in (main, *_draw_names(rng, others, int(rng.integers(0, 2))))],
            plan.background(scenery[0], size),
            size,
            max_overlap=0.0,
        ),
        main,
    )
    other_view = _main_visible(
        partial(compose_scene, rng, [plan.cutout(main, 2 * size)], plan.background(scenery[-1], 2 * size), 2 * size),
        main,
    )
    box = scene.objects[0].box
    hole = _grow(box, max(1, round(0.08 * max(box[2] - box[0], box[3] - box[1]))), size)
    hole_mask = Image.new("L", (size, size))
    hole_mask.paste(255, hole)
    exemplar = other_view.image.crop(_grow(other_view.objects[0].box, round(0.04 * size), 2 * size))
    count, item = plan.settings.bench, f"{index + 1:012d}"
    save_picture(scene.image, plan.out / "bench" / f"GT_{count}" / f"{item}_GT.png")
    save_picture(exemplar, plan.out / "bench" / f"Ref_{count}" / f"{item}_ref.png")
    save_picture(hole_mask, plan.out / "bench" / f"Mask_bbox_{count}" / f"{item}_mask.png")
    yield index + 1, main, *box, *hole


def _main_visible(compose: partial[Scene], main: str) -> Scene:
    for _ in range(50):
        scene = compose()
        if scene.objects and scene.objects[0].name == main:
            return scene
    raise UserError(f"{main}: too small or faint to be seen at this scene size; remove it or raise --size")


def _draw_names(rng: np.random.Generator, names: Sequence[str], count: int) -> list[str]:
    chosen = rng.choice(len(names), size=min(count, len(names)), replace=False)
    return [names[int(index)] for index in chosen]


def _grow(box: Box, margin: int, size: int) -> Box:
    return (max(0, box[0] - margin), max(0, box[1] - margin), min(size, box[2] + margin), min(size, box[3] + margin))


def _label(name: str) -> str:
    return f"/c/{Path(name).with_suffix('').as_posix()}"


def _write_classes(plan: _Plan) -> None:
    rows = StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(("LabelName", "DisplayName"))
    names = [*plan.cutouts.train, *plan.cutouts.held_out]
    if plan.extras is not None:
        names += [f"extra/{name}" for name in plan.extras.train]
    if plan.settings.patch_share > 0:
        names += [f"patch/{name}" for name in plan.backgrounds.train]
    for name in sorted(names):
        writer.writerow((_label(name), Path(name).stem.replace("_", " ").replace("-", " ")))
    write_file(plan.out / "annotations" / CLASS_FILE, rows.getvalue().encode())


def _result_file(plan: _Plan, part: str) -> Path:
    """Return the file whose presence says that a part is complete."""
    from ldm.data.annotations import OPEN_IMAGES_CSV  # imports PyTorch, which worker processes start faster without

    return plan.out / "bench" / "items.csv" if part == "bench" else plan.out / "annotations" / OPEN_IMAGES_CSV[part]


def _join_parts(plan: _Plan, part: str, starts: range) -> None:
    header = "ID,Cutout,XMin,YMin,XMax,YMax,HoleXMin,HoleYMin,HoleXMax,HoleYMax" if part == "bench" else BOX_HEADER
    parts = (plan.part_file(part, start).read_text(encoding="utf-8") for start in starts)
    rows = [json.loads(line) for part in parts for line in part.splitlines()]
    if part == "bench":
        write_ids(plan.out / "bench", plan.settings.bench)
    else:
        outlines = [row.pop() for row in rows]
        instances = coco_instances(rows, outlines, f"{part}/{{}}.jpg", plan.settings.size)
        write_file(plan.out / "annotations" / f"{part}.json", json.dumps(instances, separators=(",", ":")).encode())
    table = StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    write_file(_result_file(plan, part), f"{header}\n{table.getvalue()}".encode())


def coco_instances(rows: list[list[Any]], outlines: list[list[list[int]]], file: str, size: int) -> dict[str, Any]:
    """Return rows of Open Images, in relative coordinates, and the objects' outlines as COCO's instances.

    `file` makes the name of an image of its id; `size` is the side of the images.
    """
    ids = {image_id: number for number, image_id in enumerate(dict.fromkeys(row[0] for row in rows), 1)}
    labels = {label: number for number, label in enumerate(sorted({row[2] for row in rows}), 1)}
    annotations = []
    for number, (row, polygons) in enumerate(zip(rows, outlines, strict=True), 1):
        x_min, x_max, y_min, y_max = (round(float(edge) * size) for edge in row[4:8])
        objects = {"id": number, "image_id": ids[row[0]], "category_id": labels[row[2]], "iscrowd": 0}
        annotations.append(objects | {"bbox": [x_min, y_min, x_max - x_min, y_max - y_min], "segmentation": polygons})
    images = [{"id": n, "file_name": file.format(name), "width": size, "height": size} for name, n in ids.items()]
    categories = [{"id": number, "name": label.removeprefix("/c/")} for label, number in labels.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _fingerprint(pictures: Pictures) -> str:
    """Hash names and sizes: changes when an image is added, removed or changed."""
    lines = (f"{name} {(pictures.root / name).stat().st_size}" for name in sorted(pictures.train + pictures.held_out))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _claim(out: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Check that `out` is empty or holds (part of) the dataset described by `record`."""
    settings_file = out / "settings.json"
    if not settings_file.is_file():
        if foreign := [name for name in _MADE_HERE if (out / name).exists()]:
            raise UserError(f"{out}: already holds {', '.join(foreign)} from elsewhere; give another --out")
        out.mkdir(parents=True, exist_ok=True)
        return
    try:
        earlier = json.loads(settings_file.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        earlier = {}
    differing = [
        f"{key} {earlier.get(key)} (now {value})" for key, value in record.items() if earlier.get(key) != value
    ]
    if not differing:
        return
    if not overwrite:
        raise UserError(
            f"{out}: holds scenes made with other settings: {', '.join(differing)}; "
            "give another --out, or --overwrite to replace them"
        )
    for name in _MADE_HERE:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _write_licences(out: Path, folders: tuple[Path, ...]) -> None:
    """Copy the licence lists that lie in or beside the folders of images."""
    candidates = [place / "LICENSES.md" for folder in folders for place in (folder, folder.resolve().parent)]
    texts = {path.read_text(encoding="utf-8"): None for path in candidates if path.is_file()}
    if not texts:
        logger.warning("no LICENSES.md in or beside the folders of images; keep a record of their licences yourself")
        return
    write_file(out / "LICENSES.md", "\n".join(texts).encode())


def save_picture(image: Image.Image, path: Path, **options: int) -> None:
    """Write a picture as JPEG or PNG, by its suffix, whole or not at all; `options` are Pillow's."""
    content = BytesIO()
    image.save(content, "JPEG" if path.suffix == ".jpg" else "PNG", **options)
    write_file(path, content.getvalue(), sync=False)  # the rows of the chunk are synced


def write_ids(bench: Path, count: int) -> None:
    """Write the id list of a benchmark whose items are numbered from 1."""
    ids = BytesIO()
    np.save(ids, np.arange(1, count + 1))
    write_file(bench / "id_list.npy", ids.getvalue())


def write_file(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file whole or not at all; see `atomic_write`."""
    with atomic_write(path, sync=sync) as temporary:
        temporary.write_bytes(content)


# ---- command line ----


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compose training scenes from cut-outs and photographs; docs/compose.md says how to use your own."
    )
    add = parser.add_argument
    add("--from-debian", type=Path, metavar="DIR",
        help="download photographic material from Debian packages into DIR (needs no root rights)")  # fmt: skip
    add("--material", type=Path, metavar="PATH",
        help="folder with cutouts/, backgrounds/ and extras/, or a file of scripts/scenes/pack.py")  # fmt: skip
    add("--cutouts", type=Path, metavar="DIR",
        help="folder of images with transparency (default: cutouts/ of the material)")  # fmt: skip
    add("--backgrounds", type=Path, metavar="DIR",
        help="folder of photographs (default: backgrounds/ of the material)")  # fmt: skip
    add("--extra-cutouts", type=Path, metavar="DIR",
        help="cut-outs in any style, for training scenes only (default: extras/ of the material)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="dataset to write; without it, --from-debian only downloads")
    add("--count", type=int, default=12_000,
        help="training scenes; validation and test get 2 %% more each, at least 8 (default: %(default)s)")  # fmt: skip
    add("--size", type=int, default=64, help="side of a scene in pixels (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--bench", type=int, default=0, metavar="M",
        help="number of benchmark items with held-out objects, in COCOEE's layout (default: none)")  # fmt: skip
    add("--bench-size", type=int, metavar="PX", help="side of the benchmark's scenes (default: --size)")
    add("--hue-jitter", type=float, default=0.0, metavar="TURNS",
        help="recolour objects in train and validation by up to this hue shift, 0 to 0.5 (default: off)")  # fmt: skip
    add("--hue-jitter-share", type=float, default=0.5, metavar="P",
        help="probability that an object is recoloured (default: %(default)s)")  # fmt: skip
    add("--extra-share", type=float, default=0.0, metavar="P",
        help="probability that an object in a training scene is an extra cut-out (default: 0)")  # fmt: skip
    add("--patch-share", type=float, default=0.0, metavar="P",
        help="probability that an object in a training scene is a piece of a photograph (default: 0)")  # fmt: skip
    add("--objects", nargs="+", default=(), metavar="NAME",
        help="show only these cut-outs, in every split (names relative to the folder of cut-outs)")  # fmt: skip
    add("--workers", type=int, default=1,
        help="number of processes; the scenes do not depend on it (default: %(default)s)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a dataset in --out that was made with other settings")
    return parser


def main(argv: list[str] | None = None) -> int:
    from scripts.scenes.debian import fetch_material  # which uses this module
    from scripts.scenes.pack import open_material

    parser = build_parser()
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")

    debian: Path | None = arguments.from_debian
    given: Path | None = arguments.material or debian
    if given is None and None in (arguments.cutouts, arguments.backgrounds):
        parser.error("give --cutouts and --backgrounds, --material or --from-debian")
    if arguments.out is None and debian is None:
        parser.error("give --out: where the dataset goes")
    try:
        keys = {field.name for field in fields(SceneSettings)}
        values: dict[str, Any] = {key: value for key, value in vars(arguments).items() if key in keys}
        settings = SceneSettings(**{**values, "objects": tuple(arguments.objects)})
        if debian is not None:
            fetch_material(debian)
            print(f"material in {debian}; sources and licences in {debian / 'LICENSES.md'}")
        if arguments.out is not None:
            with open_material(given or Path()) as material:
                compose_dataset(
                    arguments.cutouts or material / "cutouts",
                    arguments.backgrounds or material / "backgrounds",
                    arguments.out,
                    settings,
                    extras_dir=arguments.extra_cutouts or (material / "extras" if given else None),
                    workers=arguments.workers,
                    overwrite=arguments.overwrite,
                )
            print(f"dataset in {arguments.out}; next: python scripts/read_bbox.py")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    from scripts.scenes.compose import main as run  # worker processes find classes by this name, not by __main__

    raise SystemExit(run())

"""Write edited images to files, and show them together on a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.editing.editor import save_png
from ldm.images import MID_GREY

TILE_HEIGHT, SHEET_COLUMNS = (256, 512), 6  # of the contact sheet: pixels, least and most; tiles in a row


def save_results(
    folder: Path,
    pictures: Mapping[str, tuple[Image.Image, Mapping[str, Any]]],
    settings: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write PNGs and say so; unless told to overwrite, all of them are numbered where one of the names is taken.

    Args:
        pictures: by stem, each with what its metadata say beyond the settings.
        settings: of all of them.

    Raises:
        OSError: a file cannot be written.
    """
    suffix = "" if overwrite else _free_suffix(folder, list(pictures))
    for stem, (image, detail) in pictures.items():
        path = folder / f"{stem}{suffix}.png"
        replaced = path.exists()
        save_png(image, path, {"parameters": json.dumps({**settings, **detail})})
        print(f"{'overwrote' if replaced else 'wrote'} {path}")
    if suffix:
        print(f"kept the earlier results of the same name; these end in {suffix} (--overwrite replaces them)")


def _free_suffix(folder: Path, stems: Sequence[str]) -> str:
    """Nothing, or the first of _v2, _v3 … with which none of the names is taken in the folder."""
    number = 1
    while any((folder / f"{stem}{f'_v{number}' if number > 1 else ''}.png").exists() for stem in stems):
        number += 1
    return f"_v{number}" if number > 1 else ""


def contact_sheet(
    scene: Image.Image, hole: Image.Image, exemplars: Sequence[Image.Image], results: Sequence[Image.Image]
) -> Image.Image:
    """Scene, scene with its hole, exemplars and results, of equal height, in rows of at most SHEET_COLUMNS."""
    height = min(max(scene.height, TILE_HEIGHT[0]), TILE_HEIGHT[1])

    def tile(image: Image.Image) -> Image.Image:
        width = min(max(round(image.width * height / image.height), 1), 4 * height)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    tiles = [tile(image) for image in (scene, scene, *exemplars, *results)]
    tiles[1].paste(MID_GREY, mask=hole.resize(tiles[1].size, Image.Resampling.NEAREST))
    gap, rows = 8, [tiles[i : i + SHEET_COLUMNS] for i in range(0, len(tiles), SHEET_COLUMNS)]
    width = max(sum(image.width + gap for image in row) for row in rows) - gap
    sheet = Image.new("RGB", (width, len(rows) * (height + gap) - gap), "white")
    for number, row in enumerate(rows):
        left = 0
        for image in row:
            sheet.paste(image, (left, number * (height + gap)))
            left += image.width + gap
    return sheet

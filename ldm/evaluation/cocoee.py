"""Reader of a benchmark folder in the layout of COCOEE: scenes, holes and exemplars.

ROOT/GT_*/000000000007_GT.png · ROOT/Ref_*/000000000007_ref.png · ROOT/Mask_bbox_*/000000000007_mask.png (white = hole)
· ROOT/id_list.npy. Neither the digits in the folders' names (their number of images) nor formats nor zeros matter.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.editing.hole_masks import fit_mask
from ldm.evaluation.metrics import hole_box
from ldm.files import Skipped, UserError, whole
from ldm.images import MID_GREY, find_images, load_mask, open_image

log = logging.getLogger(__name__)

ENDINGS = {"GT": "_GT", "Mask_bbox": "_mask", "Ref": "_ref"}  # of the names, by folder: scene, hole mask, exemplar


class BenchItem(NamedTuple):
    """One task: paint the exemplar into the hole of the scene."""

    id: str  # twelve digits, as in the file names
    scene: Image.Image  # RGB; the true image
    hole_mask: Image.Image  # mode L, of the scene's size, white = hole
    exemplar: Image.Image  # RGB, of any size

    def masked_scene(self) -> Image.Image:
        """Return the scene as the model is shown it: the hole in mid-grey."""
        return Image.composite(Image.new("RGB", self.scene.size, MID_GREY), self.scene, self.hole_mask)


class Bench:
    """The items of a benchmark folder, in the order of its id list; images are read when an item is asked for.

    UserError if a folder, the id list or a file of an item is missing or unusable.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{root}: no such folder; dataset/README.md says where the benchmark comes from")
        self._parts = list[tuple[Path, str, dict[str, Path]]]()
        for name, ending in ENDINGS.items():
            found = sorted(path for path in self.root.glob(f"{name}_*") if path.is_dir())
            if len(found) != 1:
                got = ", ".join(path.name for path in found) or "none"
                raise UserError(f"{root}: expected one folder {name}_…, got {got}; unpack the benchmark there")
            self._parts.append((found[0], ending, images_by_id(found[0], ending)))
        self.ids = read_ids(self.root / "id_list.npy")

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[BenchItem]:
        return map(self.item, self.ids)

    def item(self, id_: str) -> BenchItem:
        """Read the images of an item."""
        scene_path, mask_path, exemplar_path = self.paths(id_)
        scene, hole_mask = open_image(scene_path), load_mask(mask_path)
        try:
            hole_mask = fit_mask(hole_mask, scene.size, "scene")
            hole_box(hole_mask)
        except UserError as error:
            raise UserError(f"{mask_path}: {error}") from None
        return BenchItem(id_, scene, hole_mask, open_image(exemplar_path))

    def paths(self, id_: str) -> tuple[Path, Path, Path]:
        """Return the files of scene, hole mask and exemplar."""
        scene, mask, exemplar = (found.get(id_, folder / f"{id_}{end}.png") for folder, end, found in self._parts)
        return scene, mask, exemplar


def read_ids(path: Path) -> list[str]:
    """Read an array of ids (.npy), written as 7, 7.0 or 000000000007, each once and as twelve digits."""
    try:
        array = np.load(path, allow_pickle=False).ravel()
        listed = (array.astype(str) if array.dtype.kind == "S" else array).tolist()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the benchmark's ids as a NumPy array") from None
    except (ValueError, OSError, EOFError, AttributeError) as error:  # the last: several arrays in a .npz
        remedy = "write it with np.save(PATH, np.array(ids, dtype=int))"
        raise UserError(f"{path}: no NumPy array of whole numbers ({error}); {remedy}") from None
    counts: Counter[str] = Counter()
    for position, entry in enumerate(listed, 1):
        try:
            counts[f"{whole(entry):012d}"] += 1
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{path}, entry {position}: got {entry!r}, expected a whole number") from None
    if not counts:
        raise UserError(f"{path}: lists no ids; download it again")
    if repeated := [id_ for id_, count in counts.items() if count > 1]:
        log.warning("%s: lists %d ids repeatedly, each counts once: %s", path, len(repeated), ", ".join(repeated[:3]))
    return list(counts)


def images_by_id(folder: Path, ending: str = "") -> dict[str, Path]:
    """Find the images of a folder that are called by their ids: 000000000007{ending}.png, or 7{ending}, in any format.

    Of several with an id the one that is called in full counts, or else the first, with a warning. UserError if none.
    """
    found, repeated, length = dict[str, Path](), Skipped(), 12 + len(ending)
    for path in sorted(find_images(folder), key=lambda path: (len(path.stem) != length, path.suffix != ".png")):
        digits = path.stem.removesuffix(ending)
        if path.stem == digits + ending and digits.isdecimal() and path.parent == folder:
            first = found.setdefault(f"{int(digits):012d}", path)
            if first != path:
                repeated.add("left out for another image of the same id", f"{path.name}, not {first.name}")
    if not found:
        raise UserError(f"{folder}: holds no images that are called by their ids, such as 000000000007{ending}.png")
    if repeated:
        log.warning("%s: %s", folder, repeated)
    return found

"""Reader of a benchmark folder in the layout of COCOEE (scenes, holes and exemplars), and edits without a model.

ROOT/GT_*/000000000007_GT.png · ROOT/Ref_*/000000000007_ref.png · ROOT/Mask_bbox_*/000000000007_mask.png (white = hole)
· ROOT/id_list.npy. The digits after the underscore of the folders' names (their number of images, 3500) do not matter.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.evaluation.metrics import hole_box
from ldm.files import UserError
from ldm.images import MID_GREY, Box, load_mask, open_image

INPAINT_RADIUS = 3  # pixels, as in OpenCV's examples


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
    """The items of a benchmark folder, in the order of its id list. Images are read when an item is asked for.

    Raises:
        UserError: a folder or the id list is missing or unusable; for an item: a file cannot be read, or its mask has
            not its scene's size.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{root}: no such folder; dataset/README.md says where the benchmark comes from")
        self._scenes, self._exemplars, self._masks = (self._folder(name) for name in ("GT", "Ref", "Mask_bbox"))
        path = self.root / "id_list.npy"
        try:
            self.ids = [f"{int(id_):012d}" for id_ in np.load(path, allow_pickle=False).ravel()]
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected the benchmark's ids as a NumPy array") from None
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: expected a NumPy array of whole numbers ({error}); download it again") from None
        if not self.ids:
            raise UserError(f"{path}: lists no ids; download it again")

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[BenchItem]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> BenchItem:
        scene_path, mask_path, exemplar_path = self.paths(self.ids[index])
        scene, hole_mask = open_image(scene_path), load_mask(mask_path)
        if hole_mask.size != scene.size:
            raise UserError(f"{mask_path}: got {hole_mask.size} pixels, expected its scene's {scene.size}")
        return BenchItem(self.ids[index], scene, hole_mask, open_image(exemplar_path))

    def paths(self, id_: str) -> tuple[Path, Path, Path]:
        """Return the files of scene, hole mask and exemplar."""
        return self._scenes / f"{id_}_GT.png", self._masks / f"{id_}_mask.png", self._exemplars / f"{id_}_ref.png"

    def _folder(self, name: str) -> Path:
        found = sorted(path for path in self.root.glob(f"{name}_*") if path.is_dir())
        if len(found) != 1:
            got = ", ".join(path.name for path in found) or "none"
            raise UserError(f"{self.root}: expected one folder {name}_…, got {got}; unpack the benchmark there")
        return found[0]


def copy_paste(scene: Image.Image, hole_mask: Image.Image, exemplar: Image.Image) -> Image.Image:
    """Squash the exemplar into the hole's bounding box: it is shown plainly, and fits the scene badly."""
    box, pasted = Box(*hole_box(scene, hole_mask)), scene.copy()
    pasted.paste(exemplar.resize(box.size, Image.Resampling.BICUBIC), box[:2])
    return pasted


def seamless_clone(scene: Image.Image, hole_mask: Image.Image, exemplar: Image.Image) -> Image.Image:
    """Copy-paste with its seam removed: the exemplar's gradients with the surroundings' values at the hole's edge.

    OpenCV reads the target inside the hole, up to three pixels deep, and would find the true image there; so the
    hole is filled from its surroundings first. A hole as large as the scene has none: there it is copy-paste.

    Source: Perez et al. 2003 (Poisson image editing), as in OpenCV's seamlessClone.
    """
    import cv2

    left, top, right, bottom = hole_box(scene, hole_mask)
    pasted = np.asarray(copy_paste(scene, hole_mask, exemplar))
    hole = (np.asarray(hole_mask) >= 128).astype(np.uint8) * 255
    if hole.all():
        return Image.fromarray(pasted)
    margin = 2  # pixels: holes at the scene's border get an edge too
    wide_scene, wide_pasted = (
        cv2.copyMakeBorder(pixels, margin, margin, margin, margin, cv2.BORDER_REPLICATE)
        for pixels in (np.asarray(opencv_inpaint(scene, hole_mask)), pasted)
    )
    wide_hole = cv2.copyMakeBorder(hole, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=(0,))
    centre = (left + margin + (right - left) // 2, top + margin + (bottom - top) // 2)
    cloned = cv2.seamlessClone(wide_pasted, wide_scene, wide_hole, centre, cv2.NORMAL_CLONE)
    inside = cloned[margin:-margin, margin:-margin]
    return Image.fromarray(np.where(hole[..., None] > 0, inside, np.asarray(scene)))


def opencv_inpaint(scene: Image.Image, hole_mask: Image.Image, exemplar: Image.Image | None = None) -> Image.Image:
    """Fill the hole from its surroundings, without a model and without the exemplar.

    Source: Telea 2004 (fast marching), as in OpenCV.
    """
    import cv2

    hole = (np.asarray(hole_mask) >= 128).astype(np.uint8)
    return Image.fromarray(cv2.inpaint(np.asarray(scene), hole, INPAINT_RADIUS, cv2.INPAINT_TELEA))

"""Measure training samples per second of one core, against the original's method, on the same files.

    python benchmarks/loader.py                  200 JPEGs of 1024x768, samples of 512 px
    python benchmarks/loader.py --size 64 --exemplar-size 64     as for the bundled mini model

The original's method is rebuilt from its description: it reads the box from a text file; decodes the photograph once
with Pillow and once with OpenCV, and cuts the exemplar from the latter; applies Compose, Resize 224, flip, rotation,
blur and an elastic transform (an affine map and a displacement field from two Gaussian filters of sigma 50); converts
image and mask to float tensors of full size, crops and then resizes them. The published code itself took 28 ms a sample
on another machine.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from ldm.config import DataConfig
from ldm.data.annotations import open_index
from ldm.data.box_dataset import BoxDataset, SampleRecipe
from ldm.images import CLIP_MEAN, CLIP_STD

ELASTIC_SIGMA, ELASTIC_SHIFT = 50, 50


def make_images(root: Path, count: int, size: tuple[int, int]) -> None:
    """Write JPEGs of a photograph's file size (about 200 KB at 1024x768), and text files of one to five boxes each."""
    images, boxes = root / "images" / "validation", root / "bbox" / "validation"
    images.mkdir(parents=True)
    boxes.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse) + rng.normal(0, 8, (size[1], size[0], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(images / f"{i:016x}.jpg", quality=85)
        lines = []
        for _ in range(int(rng.integers(1, 6))):
            sides = np.sqrt(rng.uniform(0.03, 0.5)) * np.exp(rng.uniform(-0.3, 0.3) * np.array([1, -1])) * size
            sides = np.minimum(sides, np.array(size) - 2)
            corner = rng.uniform(0, np.array(size) - sides)
            lines.append(" ".join(f"{x:.1f}" for x in (*corner, *(corner + sides))))
        (boxes / f"{i:016x}.txt").write_text("\n".join(lines) + "\n")


def our_dataset(root: Path, size: int, exemplar_size: int) -> BoxDataset:
    """Open what `make_images` wrote; an item is (epoch, index)."""
    index = open_index(DataConfig(root=str(root)), "validation")
    return BoxDataset(index, SampleRecipe(image_size=size, exemplar_size=exemplar_size))


# ---- the original's method ----


class Original:
    def __init__(self, root: Path, size: int, exemplar_size: int) -> None:
        self.root, self.size, self.exemplar_size = root, size, exemplar_size
        self.names = sorted(path.stem for path in (root / "bbox" / "validation").iterdir())

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        import cv2

        name = self.names[i]
        path = self.root / "images" / "validation" / f"{name}.jpg"
        lines = (self.root / "bbox" / "validation" / f"{name}.txt").read_text().splitlines()
        x_0, y_0, x_1, y_1 = (int(float(word)) for word in random.choice(lines).split())
        photo = Image.open(path).convert("RGB")
        width, height = photo.size

        decoded = cv2.imread(str(path))
        assert decoded is not None
        again = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
        exemplar = again[max(y_0 - 10, 0) : min(y_1 + 10, height), max(x_0 - 10, 0) : min(x_1 + 10, width)]
        exemplar = _normalised(_augmented(exemplar, self.exemplar_size))

        left = x_0 - random.randint(0, int(0.4 * x_0))
        top = y_0 - random.randint(0, int(0.4 * y_0))
        right = x_1 + random.randint(0, int(0.4 * (width - x_1)))
        bottom = y_1 + random.randint(0, int(0.4 * (height - y_1)))
        if random.random() < 0.5:
            mask_image = Image.new("RGB", (width, height), (255, 255, 255))
            curve = _outline((x_0, y_0, x_1, y_1), (left, top, right, bottom))
            ImageDraw.Draw(mask_image).polygon(curve, fill=(0, 0, 0))
            mask = _tensor(mask_image)[:1]
        else:
            mask = torch.ones(1, height, width)
            mask[:, top:bottom, left:right] = 0
        image = (_tensor(photo) - 0.5) / 0.5
        if width > height:
            image, mask = _cropped(image, mask, (left, top, right, bottom))
        elif width < height:
            image, mask = (x.mT for x in _cropped(image.mT, mask.mT, (top, left, bottom, right)))
        image, mask = (_resized(x, self.size) for x in (image, mask))
        return {"image": image, "masked_image": image * mask, "keep_mask": mask, "exemplar": exemplar}


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def _resized(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x[None], size=(size, size), mode="bilinear", align_corners=False)[0]


def _normalised(pixels: np.ndarray) -> Tensor:
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float().div(255)
    return (x - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def _augmented(pixels: np.ndarray, size: int) -> np.ndarray:
    import cv2

    x = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)
    if random.random() < 0.5:
        x = np.ascontiguousarray(x[:, ::-1])
    border = cv2.BORDER_REFLECT_101
    if random.random() < 0.5:
        turn = cv2.getRotationMatrix2D((size / 2, size / 2), random.uniform(-20, 20), 1.0)
        x = cv2.warpAffine(x, turn, (size, size), flags=cv2.INTER_LINEAR, borderMode=border)
    if random.random() < 0.3:
        kernel = random.choice((3, 5, 7))
        x = cv2.blur(x, (kernel, kernel))
    if random.random() < 0.3:
        rng = np.random.RandomState(random.randint(0, 10000))
        centre, third = size / 2, size // 3
        points = np.array([[centre + third] * 2, [centre + third, centre - third], [centre - third] * 2], np.float32)
        moved = points + rng.uniform(-ELASTIC_SHIFT, ELASTIC_SHIFT, (3, 2)).astype(np.float32)
        x = cv2.warpAffine(x, cv2.getAffineTransform(points, moved), (size, size), borderMode=border)
        shifts = [cv2.GaussianBlur(rng.rand(size, size) * 2 - 1, (0, 0), ELASTIC_SIGMA) for _ in range(2)]
        columns, rows = np.meshgrid(np.arange(size), np.arange(size))
        along, down = (columns + shifts[0]).astype(np.float32), (rows + shifts[1]).astype(np.float32)
        x = cv2.remap(x, along, down, interpolation=cv2.INTER_LINEAR, borderMode=border)
    return x


def _outline(box: tuple[int, int, int, int], grown: tuple[int, int, int, int]) -> list[tuple[float, float]]:
    """Return four quadratic Bezier curves through the box's corners, towards the grown box, 18 jittered points each."""
    (x_0, y_0, x_1, y_1), (left, top, right, bottom) = box, grown
    corners = [(x_0, y_0), (x_1, y_0), (x_1, y_1), (x_0, y_1)]
    x_middle, y_middle = (x_0 + x_1) / 2, (y_0 + y_1) / 2
    between = [(x_middle, top), (right, y_middle), (x_middle, bottom), (left, y_middle)]
    points = []
    for k in range(4):
        ends = np.array([corners[k], between[k], corners[(k + 1) % 4]], dtype=float)
        for t in 0.05 * np.arange(1, 19):
            x, y = np.array([(1 - t) ** 2, 2 * t * (1 - t), t**2]) @ ends
            points.append((x + random.randint(-5, 5), y + random.randint(-5, 5)))
    return points


def _cropped(image: Tensor, mask: Tensor, grown: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Crop a landscape image to a square around the grown box, where the original finds one."""
    left, top, right, bottom = grown
    height, width = image.shape[1:]
    first, last = max(0, right - height), min(width, left + height) - height
    if last <= first:
        return image, mask
    x = random.randint(first, last)
    free = random.randint(0, int(0.6 * max(min(top, left - x, x + height - right, height - bottom), 0)))
    window = slice(free, height - free), slice(x + free, x + height - free)
    return image[:, *window], mask[:, *window]


# ---- timing ----


def samples_per_second(get: Callable[[int], object], count: int, seconds: float, label: str) -> float:
    """Measure one process over at least `seconds`."""
    get(0)
    done, start = 0, time.perf_counter()
    with tqdm(desc=label, unit=" samples", leave=False) as bar:
        while time.perf_counter() - start < seconds:
            get(done % count)
            done += 1
            bar.update()
    return done / (time.perf_counter() - start)


def main() -> None:
    import cv2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=200)
    add("--size", type=int, default=512, help="side of the samples, pixels; default: %(default)s")
    add("--exemplar-size", type=int, default=224, help="pixels; default: %(default)s")
    add("--seconds", type=float, default=10, help="length of each of the six measurements; default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root, args.images, (1024, 768))
        original = Original(root, args.size, args.exemplar_size)
        ours = our_dataset(root, args.size, args.exemplar_size)
        ratios = []
        for k in range(3):  # alternately, because other load on the machine varies
            theirs = samples_per_second(original.__getitem__, args.images, args.seconds, "original")
            mine = samples_per_second(lambda i, k=k: ours[k, i], args.images, args.seconds, "ours")
            ratios.append(mine / theirs)
            print(f"original {theirs:6.1f} samples/s   ours {mine:6.1f} samples/s   ratio {ratios[-1]:.2f}")
        print(f"ratio, median of 3: {sorted(ratios)[1]:.2f} ({args.size} px, one of {os.cpu_count()} cores)")


if __name__ == "__main__":
    main()

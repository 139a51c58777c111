"""Configuration: typed schemas, which alone give each setting its name, default and range; loading, overrides.

`docs/config.md` maps the keys of the original `configs/v1.yaml` to these.
"""

import math
import operator
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast, dataclass_transform

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.files import UserError, whole

RELIGHTING_CHANNELS = ("z_foreground", "z_background")
INPUT_CHANNELS = ("x_t", "z_masked", "keep_mask", "hole_mask", *RELIGHTING_CHANNELS, "low_res", "x_0_pred")
VARIANCES = ("posterior", "beta", "learned_range")
# After the warm-up; at the last step cosine has fallen to 5 % of base_lr, linear to 0.
LR_SCHEDULES = ("constant", "cosine", "linear")
RENAMED = {  # keys of earlier versions, in configs beside checkpoints and in run directories => their names now
    "model": {"context_margin": "crop_margin"},
    "data": {
        "arbitrary_mask_percent": "p_arbitrary_mask",
        "exact_mask_percent": "p_object_mask",
        "context_margins": "crop_margin_range",
    },
    "first_stage_training": {"unknown_percent": "p_no_condition"},
}
OVERRIDE = re.compile(r"(stage|seed|\w+(\.\w+)+)=")
# Whole numbers that Lightning takes unchecked, with their least values; those that begin with `max_` may also be -1.
TRAINER = {"log_every_n_steps": 0, "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1}
TRAINER |= {"max_epochs": 1, "max_steps": 1}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


class ConfigError(UserError):
    """A config file or override that cannot be used; the message names the key and the remedy."""


def setting(default: Any, **rules: Any) -> Any:
    """Declare a key with the values that it may have: `choices`, or the bounds `gt`, `ge`, `lt`, `le`."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=rules)
    return field(default=default, metadata=rules)


@dataclass_transform()
class Section:
    """Base of the schemas: makes a subclass a dataclass whose values, or the items of lists, obey their rules."""

    prefix: ClassVar[str]  # of the section's keys in messages

    def __init_subclass__(cls, prefix: str = "") -> None:
        cls.prefix = prefix
        dataclass(cls)

    def __post_init__(self) -> None:
        for key in fields(self):  # pyright: ignore[reportArgumentType]: the subclasses are dataclasses
            value, bounds = getattr(self, key.name), dict(key.metadata)
            choices = bounds.pop("choices", None)
            for item in value if isinstance(value, list) else [value]:
                if choices and item not in choices:
                    raise self.error(key.name, f"one of {', '.join(choices)}", item)
                if isinstance(item, float) and not math.isfinite(item):
                    raise self.error(key.name, "a finite number", item)
                if item is not None and not all(getattr(operator, rule)(item, bounds[rule]) for rule in bounds):
                    expected = " and ".join(f"{SIGNS[rule]} {bounds[rule]}" for rule in bounds)
                    percent = bounds == {"ge": 0, "le": 1} and 1 < item <= 100
                    raise self.error(key.name, expected + f"; {item:g} % is {item / 100:g}" * percent, item)
        self.check_together()

    def check_together(self) -> None:
        """Check what several keys have to agree on."""

    def error(self, key: str, expected: str, value: Any = None) -> ConfigError:
        """Return the error for a key whose value, or one of whose items, is not what is expected."""
        got = getattr(self, key) if value is None else value
        return ConfigError(f"{self.prefix}{key}: got {got!r}, expected {expected}")


class ScheduleConfig(Section, prefix="model.schedule."):
    """Noise schedule; the defaults are Stable Diffusion's (`linear` in the original's naming)."""

    name: str = setting("scaled_linear", choices=("scaled_linear", "linear", "cosine", "sigmoid", "edm"))
    num_timesteps: int = setting(1000, ge=1)
    linear_start: float = 0.00085
    linear_end: float = 0.0120
    cosine_s: float = 0.008
    zero_terminal_snr: bool = False  # the last timestep is pure noise (Lin et al. 2024)
    # edm: the network is preconditioned for images of this standard deviation; range of noise levels, and the mean and
    # standard deviation of their logarithms in training
    sigma_data: float = setting(0.5, gt=0)
    sigma_min: float = setting(0.002, gt=0)
    sigma_max: float = setting(80.0, gt=0)
    p_mean: float = -1.2
    p_std: float = setting(1.2, gt=0)

    def check_together(self) -> None:
        if not 0 < self.linear_start <= self.linear_end < 1:
            raise self.error("linear_end", f"0 < linear_start ({self.linear_start}) <= linear_end < 1")


class UNetConfig(Section, prefix="model.unet."):
    """Denoising UNet; the defaults are the paper's (Stable Diffusion v1 with 9 input channels).

    With `context_dim: 0` it is that of improved-diffusion and guided-diffusion (ADM), which reads no tokens.
    """

    in_channels: int = setting(9, ge=1)
    out_channels: int = setting(4, ge=1)
    model_channels: int = setting(320, ge=1)
    channel_mult: list[float] = setting([1, 2, 4, 4], gt=0)
    num_res_blocks: int = setting(2, ge=1)
    attention_resolutions: list[int] = setting([4, 2, 1], ge=1)  # downsampling factors
    num_heads: int = setting(8, ge=1)
    head_channels: int | None = setting(None, ge=1)  # instead of num_heads; without context
    num_heads_upsample: int | None = setting(None, ge=1)  # without context; default: num_heads
    transformer_depth: int = setting(1, ge=1)
    context_dim: int = setting(768, ge=0)  # 0: plain self-attention
    num_classes: int | None = setting(None, ge=1)  # labels whose embedding is added to the timestep's
    scale_shift: bool = False  # the timestep embedding scales and shifts a normalised map, else it is added to the map
    resample: str = setting("conv", choices=("conv", "pool", "res_block"))  # between levels
    time_scale: float = setting(1.0, gt=0)  # of the timesteps: 1000 / num_timesteps in improved-diffusion
    norm_groups: int = setting(32, ge=1)  # of the group norms; few channels per group erase absolute colour
    dropout: float = setting(0.0, ge=0, lt=1)
    activation_checkpointing: bool = False

    @property
    def level_channels(self) -> list[int]:
        """Channels of each level."""
        return [int(self.model_channels * factor) for factor in self.channel_mult]


class ClassifierConfig(Section, prefix="model.classifier."):
    """Classifier of noisy images: the UNet's encoder as `model.unet` describes it, and a pool."""

    # attention: the published ones; adaptive: mean of the map; spatial, spatial_v2: means of all maps, then two layers
    pool: str = setting("attention", choices=("attention", "adaptive", "spatial", "spatial_v2"))
    num_classes: int = setting(1000, ge=2)


class AutoencoderConfig(Section, prefix="model.first_stage."):
    """First stage (KL-regularised autoencoder); the defaults are Stable Diffusion's, f = 8."""

    in_channels: int = setting(3, ge=1)
    ch: int = setting(128, ge=1)
    ch_mult: list[int] = setting([1, 2, 4, 4], ge=1)
    num_res_blocks: int = setting(2, ge=1)
    z_channels: int = setting(4, ge=1)
    embed_dim: int = setting(4, ge=1)
    patch_size: int = setting(1, ge=1)  # side of the pixel squares that become channels (space to depth)
    norm_groups: int = setting(32, ge=0)  # as in the UNet; 0: no norms
    dropout: float = setting(0.0, ge=0, lt=1)
    linear_path: bool = False  # a linear map of each cell beside encoder and decoder; it starts as a cosine transform
    encoder: str = setting("network", choices=("network", "linear"))  # linear: the linear path alone, never trained
    decoder: str = setting("plain", choices=("plain", "asymmetric"))  # asymmetric: also reads the pixels to keep
    decoder_width: float = setting(1.0, gt=0)  # asymmetric: channels relative to the encoder; published: 1, 1.5, 2
    decoder_res_blocks: int | None = setting(None, ge=1)  # asymmetric; default: num_res_blocks; published: 2, 3, 5

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell and side."""
        return self.patch_size * 2 ** (len(self.ch_mult) - 1)

    def check_together(self) -> None:
        most = 3 * self.downsampling**2
        if self.linear_path and not (self.in_channels == 3 and self.z_channels == self.embed_dim <= most):
            raise self.error("linear_path", f"false, or 3 in_channels and z_channels = embed_dim <= {most}")
        if self.encoder == "linear" and not self.linear_path:
            raise self.error("encoder", "network, or linear_path: true")
        if self.decoder_width * self.ch % 1:
            raise self.error("decoder_width", f"a whole number of channels when multiplied by ch ({self.ch})")


class ExemplarEncoderConfig(Section, prefix="model.exemplar_encoder."):
    """Image tower and mapper; the defaults are CLIP ViT-L/14 and the paper's five blocks."""

    # clip reads the sizes from patch_size to num_heads; efficientnet-lite0 comes with ImageNet weights
    tower: str = setting("clip", choices=("clip", "efficientnet-lite0"))
    image_size: int = setting(224, ge=1)
    patch_size: int = setting(14, ge=1)
    hidden_size: int = setting(1024, ge=1)
    intermediate_size: int = setting(4096, ge=1)
    num_layers: int = setting(24, ge=1)
    num_heads: int = setting(16, ge=1)
    mapper_layers: int = setting(5, ge=0)
    tokens: str = setting("pooled", choices=("pooled", "all"))  # outputs of the tower; pooled: the paper's bottleneck


class TextEncoderConfig(Section, prefix="model.text_encoder."):
    """Text tower; the defaults are those of CLIP ViT-L/14, as in Stable Diffusion v1."""

    tokenizer: str | None = None  # folder with vocab.json and merges.txt; by default `tokenizer` beside the checkpoint
    vocab_size: int = setting(49408, ge=1)
    max_length: int = setting(77, ge=2)  # tokens, including start and end
    hidden_size: int = setting(768, ge=1)
    intermediate_size: int = setting(3072, ge=1)
    num_layers: int = setting(12, ge=1)
    num_heads: int = setting(12, ge=1)


class ModelConfig(Section, prefix="model."):
    """The whole model: pixels, latents, tokens."""

    # latent: Stable Diffusion and what is made from it; pixel: images themselves; classifier: of noisy images
    kind: str = setting("latent", choices=("latent", "pixel", "classifier"))
    image_size: int = setting(512, ge=1)  # pixels, side of the square that the model edits
    scale_factor: float = setting(0.18215, gt=0)  # latent = scale_factor * posterior sample
    # standard deviations of the scaled latents' channels, for preconditioning; []: none, as if all were 1
    latent_std: list[float] = setting([], gt=0)
    crop_margin: float = setting(0.5, ge=0)  # context around a hole when editing, relative to the hole's longer side
    guidance_scale: float = setting(5.0, ge=-1000, le=1000)  # of edits that do not ask for another
    parameterization: str = setting("eps", choices=("eps", "v", "x0"))  # the UNet's prediction
    last_level: float = setting(0.0, ge=0, lt=1)  # noise level t / T at which sampling takes the predicted x_0
    variance: str = setting("posterior", choices=VARIANCES)  # pixel: of a step back; learned_range doubles out_channels
    small_size: int | None = setting(None, ge=1)  # pixel: side of low_res images
    # pixel: order of queries, keys and values in a file of improved-diffusion or guided-diffusion that is loaded
    attention_layout: str = setting("head_qkv", choices=("head_qkv", "qkv_head"))
    condition: str = setting("exemplar", choices=("exemplar", "text", "both"))  # both: exemplar token, then text tokens
    # The UNet's input, in this order. keep_mask (1 = keep, resized bilinearly) is Paint by Example's, hole_mask (1 =
    # paint, thresholded at 0.5, nearest) is Stable Diffusion inpainting's; z_foreground, z_background are IC-Light's;
    # low_res (upsampling) and x_0_pred (self-conditioning) are for pixels.
    input_channels: list[str] = setting(["x_t", "z_masked", "keep_mask"], choices=INPUT_CHANNELS)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    first_stage: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    exemplar_encoder: ExemplarEncoderConfig = field(default_factory=ExemplarEncoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    def check_together(self) -> None:
        if self.condition == "both" and self.exemplar_encoder.tokens != "pooled":  # there is one null token
            raise self.exemplar_encoder.error("tokens", "pooled for model.condition both")
        if self.input_channels[:1] != ["x_t"] or len(set(self.input_channels)) < len(self.input_channels):
            raise self.error("input_channels", "x_t first and no name twice")
        if self.latent_std and (len(self.latent_std) != self.unet.out_channels or self.parameterization != "v"):
            raise self.error("latent_std", f"{self.unet.out_channels} numbers and model.parameterization v, or []")
        if self.last_level and self.kind != "latent":  # samplers in pixel space go to the end
            raise self.error("last_level", "0, or model.kind latent")
        if self.schedule.zero_terminal_snr and self.parameterization == "eps":  # pure noise does not determine x_0
            raise self.schedule.error("zero_terminal_snr", "false for model.parameterization eps, or v or x0 there")


class DataConfig(Section, prefix="data."):
    """Where samples come from and how they are made."""

    kind: str = setting(
        "open_images", choices=("open_images", "coco", "voc", "yolo", "masks", "shards", "cached", "images")
    )
    root: str = "dataset/open-images"  # shards: or an address, http://…, s3://…, pipe:COMMAND {}
    annotations: str | None = None  # file or folder; default: the format's usual place below `root`
    val_annotations: str | None = None  # coco: of validation; default: hold out a share of the images
    index: str | None = None  # folder for the box indexes; default: ROOT/index
    # What the boxes of a photograph that EXIF rotates refer to: apply = the upright photograph, ignore = the pixels as
    # stored, auto = whichever has the annotated size, else the upright one. skip leaves such photographs out.
    exif: str = setting("auto", choices=("auto", "apply", "ignore", "skip"))  # open_images: always ignore
    strict: bool = False  # true: an image or annotation that cannot be used is an error, instead of left out
    batch_size: int = setting(2, ge=1)  # per device
    val_batch_size: int = setting(2, ge=1)
    num_workers: int = setting(8, ge=0)
    captions: str | None = None  # for prompts: classes (the annotations' class names), or a CSV file
    p_arbitrary_mask: float = setting(0.5, ge=0, le=1)  # probability of a hole of arbitrary shape
    p_object_mask: float = setting(0.0, ge=0, le=1)  # probability of the object's own shape, where it is known
    augment_exemplar: bool = True  # flip, rotate, blur and distort the exemplar
    augmentation_strength: float = setting(1.0, ge=0)  # multiplies the augmentation's angles and lengths
    augmentation: dict[str, Any] | None = None  # replaces all of that: what `albumentations.to_dict` gives
    grey_background: bool = False  # show the exemplar over mid-grey, where its shape is known
    p_new_background: float = setting(0.0, ge=0, le=1)  # probability of showing it over random colours instead
    crop_margin_range: list[float] = setting([], gt=0)  # [low, high]: crop as editing does; []: as the paper
    labels: str = setting("folder", choices=("folder", "prefix"))  # images: class = sub-folder, or name before "_"
    crop: str = setting("center", choices=("center", "random"))  # images
    flip: bool = False  # images: mirror half of the training samples
    shuffle_buffer: int = setting(1000, ge=1)  # shards: images that a worker shuffles among
    max_val_samples: int = setting(2000, ge=1)  # validation reads at most this many samples

    def check_together(self) -> None:
        if (margins := self.crop_margin_range) and (len(margins) != 2 or margins != sorted(margins)):
            raise self.error("crop_margin_range", "[low, high] with low <= high, or []")


class TrainingConfig(Section, prefix="training."):
    """Objective and optimizer of the diffusion model."""

    base_lr: float = setting(1.0e-5, gt=0, le=1)
    lr_schedule: str = setting("constant", choices=LR_SCHEDULES)
    warmup_steps: int = setting(10_000, ge=0)
    weight_decay: float = setting(0.01, ge=0)
    optimizer: str = setting("adamw", choices=("adamw", "adamw_fused", "adamw_8bit"))  # 8bit: bitsandbytes and a GPU
    # all: everything that is not frozen anyway; the others: these layers of the UNet
    trainable: str = setting("all", choices=("all", "input_conv", "input_conv_attention"))
    p_uncond: float = setting(0.2, ge=0, le=1)  # probability of the null token or the empty prompt as the condition
    null_drop: str = setting("per_sample", choices=("per_sample", "per_batch"))  # per_batch: as the original
    # logit_normal: middle timesteps more often; loss_aware: those with large losses more often
    timesteps: str = setting("uniform", choices=("uniform", "logit_normal", "loss_aware"))
    offset_noise: float = setting(0.0, ge=0)  # standard deviation of a constant added to each channel's noise
    min_snr_gamma: float = setting(0.0, ge=0)  # weight x_0 errors by min(SNR, gamma); 0: no weights, as the paper
    # adds to the error the distance of an ImageNet classifier's features between predicted and true x_0
    perceptual_weight: float = setting(0.0, ge=0)
    perceptual_start: int = setting(0, ge=0)  # first step with it
    ema_decay: float = setting(0.0, ge=0, lt=1)  # 0: no EMA; the paper trains with 0.9999
    more_ema_decays: list[float] = setting([], gt=0, lt=1)  # further averages that checkpoints hold beside it
    train_tower: bool = False  # train the image or text tower too (for models without a pretrained one)
    tower_lr_scale: float = setting(1.0, gt=0)  # the tower's learning rate relative to base_lr
    # pixel: simple = squared error; vlb = the variational bound; hybrid = error + vlb_weight * bound, for a learned
    # variance, by default num_timesteps / 1000
    objective: str = setting("simple", choices=("simple", "hybrid", "vlb"))
    vlb_weight: float | None = setting(None, ge=0)
    immiscible: bool = False  # pixel: give each image of a batch noise that is near to it (Li et al. 2024)
    self_condition_rate: float = setting(0.5, ge=0, le=1)  # pixel, with x_0_pred in model.input_channels
    lora_rank: int = setting(0, ge=0)  # train only low-rank additions to the UNet's attention; 0: no LoRA
    use_prior: bool = True  # false: load only the frozen parts of --pretrained-model, start the others at random
    fresh_conditioning: bool = False  # start mapper, projection and null token at random in any case
    compile: bool = False  # torch.compile the UNet

    def check_together(self) -> None:
        if self.trainable != "all" and (self.lora_rank or self.train_tower):
            raise self.error("trainable", "all with training.lora_rank or training.train_tower")


class FirstStageTrainingConfig(Section, prefix="first_stage_training."):
    """Objective of the first stage: L1 + perceptual + KL, with an optional patch discriminator."""

    base_lr: float = setting(4.5e-6, gt=0, le=1)
    lr_schedule: str = setting("constant", choices=LR_SCHEDULES)
    warmup_steps: int = setting(0, ge=0)
    trainable: str = setting("all", choices=("all", "decoder"))  # decoder: latents stay; always so if asymmetric
    kl_weight: float = setting(1e-6, ge=0)  # sum over the latent against mean over pixels: 2e5 times LDM's at 256 px
    colour_weight: float = setting(0.0, ge=0)  # of the squared error between images averaged over each latent cell
    perceptual_weight: float = setting(0.0, ge=0)
    perceptual_start: int = setting(0, ge=0)  # first step with the perceptual term
    adversarial_weight: float = setting(0.0, ge=0)
    adversarial_start: int = setting(50_001, ge=0)  # first step with the discriminator
    ema_decay: float = setting(0.0, ge=0, lt=1)
    p_no_condition: float = setting(0.5, ge=0, le=1)  # asymmetric decoder: probability of hiding all pixels to keep


class LoggingConfig(Section, prefix="logging."):
    """What a run writes beside its checkpoints."""

    loggers: list[str] = setting(["tensorboard", "csv"], choices=("tensorboard", "csv", "wandb"))
    wandb_project: str = "paint-by-example"
    image_every: int = setting(5000, ge=0)  # steps between image grids; 0: none
    num_images: int = setting(4, ge=1)
    sampler_steps: int = setting(50, ge=1)
    guidance_scale: float = 5.0
    fid_every: int = setting(0, ge=0)  # pixel: steps between Fréchet distances of samples; 0: none
    fid_samples: int = setting(1000, ge=2)
    fid_features: str = "efficientnet-lite0"  # or any network of scripts/evaluate.py, or inception:FILE
    checkpoint_every: int = setting(5000, ge=0)  # steps between checkpoints; 0: only the last
    keep_last: int = setting(2, ge=0)  # periodic checkpoints kept beside `last` and `best`


class Config(Section):
    """A run: one model, one data source, one trainer."""

    stage: str = setting("diffusion", choices=("diffusion", "first_stage", "classifier"))  # the part that is trained
    seed: int = setting(23, ge=-(2**63), lt=2**64)  # of weights, data order and noise
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    first_stage_training: FirstStageTrainingConfig = field(default_factory=FirstStageTrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # keyword arguments of Lightning's Trainer

    def check_together(self) -> None:
        self.seed %= 2**64  # signed and unsigned spellings of 64 bits are one seed
        fits = self.model.kind == "latent" and self.model.first_stage.linear_path and self.model.image_size % 32 == 0
        if self.training.perceptual_weight and not fits:
            expected = "0, or a latent model of a multiple of 32 px with model.first_stage.linear_path"
            raise self.training.error("perceptual_weight", expected)
        for key, value in self.trainer.items():
            if key in TRAINER and value is not None:
                with suppress(TypeError, ValueError):
                    self.trainer[key] = value = whole(value)
                endless = key.startswith("max_")
                if not isinstance(value, int) or (value < TRAINER[key] and not (endless and value == -1)):
                    expected = f"a whole number >= {TRAINER[key]}" + ", or -1 for a run without an end" * endless
                    raise self.error(f"trainer.{key}", expected, value)
            if key in ("gradient_clip_val", "val_check_interval") and isinstance(value, int | float) and value <= 0:
                raise self.error(f"trainer.{key}", "> 0", value)


_structured = cache(OmegaConf.structured)  # 30 ms


def load_config(*sources: str | Path | DictConfig | Config, overrides: Iterable[str] = ()) -> Config:
    """Merge `sources` from left to right, then `overrides`, `section.key=value`, into a validated `Config`.

    Raises:
        ConfigError: a file is missing or is not YAML, a key is unknown, or a value is of the wrong type or range.
    """
    merged: Any = deepcopy(_structured(Config))  # merged in place: a copy for each source takes longer than all else
    named = [(str(source) if isinstance(source, str | Path) else "config", source) for source in sources]
    for name, source in [*named, *((f"override {override!r}", [override]) for override in overrides)]:
        try:
            parsed: Any = OmegaConf.load(source) if isinstance(source, str | Path) else source
            parsed = OmegaConf.from_dotlist(parsed) if isinstance(parsed, list) else OmegaConf.structured(parsed)
            for section, names in RENAMED.items():
                values = parsed.get(section)
                for old in names.keys() & values.keys() if isinstance(values, DictConfig) else ():
                    values[names[old]] = values.pop(old)
            merged = OmegaConf.unsafe_merge(merged, parsed)
        except Exception as error:  # PyYAML's, OmegaConf's and Python's errors share no base
            key = f"{error.full_key}: " if isinstance(error, OmegaConfBaseException) and error.full_key else ""
            reason = " ".join(str(error).split("\n    full_key")[0].split())
            where = "see ldm/config.py for the keys and configs/ for examples"
            raise ConfigError(f"{name}: {key}{reason}; {where}") from error
    try:
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # a value refers to another one that is not there
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}; give it a value") from error


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into other words, for a parser, whose --base would swallow overrides, and overrides."""
    return [word for word in words if not OVERRIDE.match(word)], [word for word in words if OVERRIDE.match(word)]


def dump_config(config: Config) -> str:
    """Return the config as YAML, every default written out; `load_config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))

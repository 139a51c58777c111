"""Configuration: typed schemas, loading, command-line overrides.

A config file is YAML with the sections of `Config` below. The schemas are the single place where
a setting has a name, a type and a default; `load_config` merges files and overrides into them and
refuses every key that they do not declare. `docs/config.md` maps the keys of the original
`configs/v1.yaml` to these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.files import UserError

INPAINTING_CHANNELS = ("z_masked", "keep_mask", "hole_mask")
RELIGHTING_CHANNELS = ("z_foreground", "z_background")
INPUT_CHANNELS = ("x_t", *INPAINTING_CHANNELS, *RELIGHTING_CHANNELS)
RENAMED = {  # keys of earlier versions, read from configs that lie beside checkpoints and in run directories
    "model": {"context_margin": "crop_margin"},
    "data": {
        "arbitrary_mask_percent": "p_arbitrary_mask",
        "exact_mask_percent": "p_object_mask",
        "context_margins": "crop_margin_range",
    },
    "first_stage_training": {"unknown_percent": "p_no_condition"},
}


class ConfigError(UserError):
    """A config file or override that cannot be used; the message says which key and what to do."""


def _one_of(key: str, value: str, choices: Iterable[str]) -> None:
    choices = list(choices)
    if value not in choices:
        raise ConfigError(f"{key}: got {value!r}, expected one of {', '.join(choices)}")


@dataclass
class ScheduleConfig:
    """Noise schedule; the defaults are Stable Diffusion's (`linear` in the original's naming)."""

    name: str = "scaled_linear"  # scaled_linear | linear | cosine
    num_timesteps: int = 1000
    linear_start: float = 0.00085
    linear_end: float = 0.0120
    cosine_s: float = 0.008
    zero_terminal_snr: bool = False  # the last step is noise alone (Lin et al. 2024)

    def __post_init__(self) -> None:
        _one_of("schedule.name", self.name, ("scaled_linear", "linear", "cosine"))


@dataclass
class UNetConfig:
    """Denoising UNet; the defaults are the paper's (Stable Diffusion v1 with 9 input channels)."""

    in_channels: int = 9
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    attention_resolutions: list[int] = field(default_factory=lambda: [4, 2, 1])  # downsampling factors
    num_heads: int = 8
    transformer_depth: int = 1
    context_dim: int = 768
    norm_groups: int = 32  # of the group norms; with few channels per group they erase absolute colour
    dropout: float = 0.0
    activation_checkpointing: bool = False


@dataclass
class AutoencoderConfig:
    """First stage (KL-regularised autoencoder); the defaults are Stable Diffusion's, f = 8."""

    in_channels: int = 3
    ch: int = 128
    ch_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    z_channels: int = 4
    embed_dim: int = 4
    patch_size: int = 1  # side of the squares of pixels that enter and leave as channels (space to depth)
    norm_groups: int = 32  # as in the UNet; 0: no norms
    dropout: float = 0.0
    decoder: str = "plain"  # plain | asymmetric (it also sees the pixels that an edit keeps)
    decoder_width: float = 1.0  # asymmetric: its channels over the encoder's; published: 1, 1.5 and 2
    decoder_res_blocks: int | None = None  # asymmetric: as num_res_blocks, which is the default; published: 2, 3 and 5

    def __post_init__(self) -> None:
        _one_of("model.first_stage.decoder", self.decoder, ("plain", "asymmetric"))
        if self.decoder_width <= 0 or self.decoder_width * self.ch % 1:
            raise ConfigError(
                f"model.first_stage.decoder_width: got {self.decoder_width:g}, expected a number that makes ch "
                f"({self.ch}) times it a whole number of channels"
            )


@dataclass
class ExemplarEncoderConfig:
    """Image tower and mapper; the defaults are CLIP ViT-L/14 and the paper's five blocks."""

    tower: str = "clip"  # clip (the four sizes after patch_size are its) | efficientnet-lite0 (ImageNet weights)
    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    mapper_layers: int = 5
    tokens: str = "pooled"  # the tower's output that is passed on: pooled (the paper's bottleneck) | all

    def __post_init__(self) -> None:
        _one_of("model.exemplar_encoder.tower", self.tower, ("clip", "efficientnet-lite0"))
        _one_of("model.exemplar_encoder.tokens", self.tokens, ("pooled", "all"))


@dataclass
class TextEncoderConfig:
    """Text tower; the defaults are those of CLIP ViT-L/14, which Stable Diffusion v1 reads prompts with."""

    tokenizer: str | None = None  # folder with vocab.json and merges.txt; by default `tokenizer` beside the checkpoint
    vocab_size: int = 49408
    max_length: int = 77  # tokens, start and end among them
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12


@dataclass
class ModelConfig:
    """The whole model: pixels, latents, tokens."""

    image_size: int = 512  # pixels, side of the square that the model edits
    scale_factor: float = 0.18215  # latent = scale_factor * posterior sample
    crop_margin: float = 0.5  # what editing shows around a hole, as a share of the hole's longer side
    parameterization: str = "eps"  # what the UNet predicts: eps | v | x0
    condition: str = "exemplar"  # what the context tokens are: exemplar | text | both, one after the other
    # of the UNet, in this order: keep_mask (1 = keep, resized bilinearly) is Paint by Example's, hole_mask (1 = paint,
    # cut at a half, resized to the nearest) Stable Diffusion inpainting's; z_foreground and z_background are IC-Light's
    input_channels: list[str] = field(default_factory=lambda: ["x_t", "z_masked", "keep_mask"])
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    first_stage: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    exemplar_encoder: ExemplarEncoderConfig = field(default_factory=ExemplarEncoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)

    def __post_init__(self) -> None:
        if self.crop_margin < 0:
            raise ConfigError(f"model.crop_margin: got {self.crop_margin}, expected 0 or more")
        _one_of("model.parameterization", self.parameterization, ("eps", "v", "x0"))
        _one_of("model.condition", self.condition, ("exemplar", "text", "both"))
        if self.condition == "both" and self.exemplar_encoder.tokens != "pooled":
            raise ConfigError(
                "model.exemplar_encoder.tokens: got all with condition both, expected pooled: beside text one null "
                "token cannot stand for many"
            )
        for name in self.input_channels:
            _one_of("model.input_channels", name, INPUT_CHANNELS)
        if self.input_channels[:1] != ["x_t"] or len(set(self.input_channels)) < len(self.input_channels):
            raise ConfigError(f"model.input_channels: got {self.input_channels}, expected x_t first and no name twice")
        if self.schedule.zero_terminal_snr and self.parameterization == "eps":
            raise ConfigError(
                "model.schedule.zero_terminal_snr: got true with parameterization eps, which says nothing about x_0 "
                "where there is noise alone; use v or x0"
            )


@dataclass
class DataConfig:
    """Where samples come from and how they are made."""

    kind: str = "open_images"  # open_images | coco | voc | yolo | masks | shards | cached
    root: str = "dataset/open-images"  # shards: or an address, http://…, s3://…, pipe:COMMAND {}
    annotations: str | None = None  # file or folder; by default at the format's own place below `root`
    val_annotations: str | None = None  # coco: of validation; else a share of the images is held out
    index: str | None = None  # folder for the indexes of boxes; default: ROOT/index
    batch_size: int = 2  # per device
    val_batch_size: int = 2
    num_workers: int = 8
    captions: str | None = None  # for prompts: classes (what the annotations call the object), or a CSV file
    p_arbitrary_mask: float = 0.5  # share of arbitrary shapes among the holes
    p_object_mask: float = 0.0  # share of holes with the object's own shape, where it is known
    augment_exemplar: bool = True  # flip, rotate, blur and distort the exemplar
    augmentation_strength: float = 1.0  # multiplies the angles and lengths of that
    grey_background: bool = False  # show the exemplar over mid-grey, where its shape is known
    crop_margin_range: list[float] = field(default_factory=list)  # [low, high]: crop as editing does; []: as the paper
    shuffle_buffer: int = 1000  # shards: images that a worker shuffles among
    max_val_samples: int = 2000  # validation reads at most this many samples

    def __post_init__(self) -> None:
        _one_of("data.kind", self.kind, ("open_images", "coco", "voc", "yolo", "masks", "shards", "cached"))
        margins = self.crop_margin_range
        if margins and not (len(margins) == 2 and 0 < margins[0] <= margins[1]):
            raise ConfigError(
                f"data.crop_margin_range: got {list(margins)}, expected [low, high], 0 < low <= high, or []"
            )


@dataclass
class TrainingConfig:
    """Objective and optimizer of the diffusion model."""

    base_lr: float = 1.0e-5
    lr_schedule: str = "constant"  # after warm-up: constant | cosine (to 5 % of base_lr at the last step)
    warmup_steps: int = 10_000
    weight_decay: float = 0.01
    optimizer: str = "adamw"  # adamw | adamw_fused | adamw_8bit (needs bitsandbytes and a GPU)
    trainable: str = "all"  # but for what is frozen anyway: all | of the UNet input_conv | input_conv_attention
    p_uncond: float = 0.2  # how often the exemplar is replaced by the null token, the prompt by the empty one
    null_drop: str = "per_sample"  # per_sample | per_batch (as the original)
    timesteps: str = "uniform"  # uniform | logit_normal (middle ones more often) | loss_aware (those with large losses)
    offset_noise: float = 0.0  # standard deviation of a constant added to each channel's noise
    min_snr_gamma: float = 0.0  # weigh timesteps by min(SNR, gamma), of errors of x_0; 0: all alike, as the paper
    ema_decay: float = 0.0  # 0 switches EMA off; the paper trains with 0.9999
    train_tower: bool = False  # train the tower too, of images or text (for models without a pretrained one)
    tower_lr_scale: float = 1.0  # of base_lr, for the tower
    lora_rank: int = 0  # train additions of this rank to the UNet's attention, and nothing else; 0: no LoRA
    use_prior: bool = True  # false: of --pretrained-model take the frozen parts alone, the rest starts random
    fresh_conditioning: bool = False  # mapper, projection and null token start random in any case
    compile: bool = False  # torch.compile the UNet

    def __post_init__(self) -> None:
        if self.min_snr_gamma < 0:
            raise ConfigError(f"training.min_snr_gamma: got {self.min_snr_gamma}, expected 0 (off) or more")
        if self.lora_rank < 0:
            raise ConfigError(f"training.lora_rank: got {self.lora_rank}, expected 0 (off) or more")
        if self.offset_noise < 0:
            raise ConfigError(f"training.offset_noise: got {self.offset_noise}, expected 0 (off) or more")
        _one_of("training.trainable", self.trainable, ("all", "input_conv", "input_conv_attention"))
        if self.trainable != "all" and (self.lora_rank or self.train_tower):
            raise ConfigError(
                f"training.trainable: got {self.trainable} with lora_rank or train_tower, which train something else; "
                "choose one of them"
            )
        _one_of("training.optimizer", self.optimizer, ("adamw", "adamw_fused", "adamw_8bit"))
        _one_of("training.timesteps", self.timesteps, ("uniform", "logit_normal", "loss_aware"))
        _one_of("training.null_drop", self.null_drop, ("per_sample", "per_batch"))
        _one_of("training.lr_schedule", self.lr_schedule, ("constant", "cosine"))


@dataclass
class FirstStageTrainingConfig:
    """Objective of the first stage: L1 + perceptual + KL, with an optional patch discriminator.

    For an asymmetric decoder the encoder is frozen, and the KL, which is the encoder's alone, left out.
    """

    base_lr: float = 4.5e-6
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    kl_weight: float = 1.0e-6
    colour_weight: float = 0.0  # of the squared error between pictures averaged over each latent cell
    perceptual_weight: float = 0.0
    perceptual_start: int = 0  # first step with the perceptual term: before it there is little to be judged by it
    adversarial_weight: float = 0.0
    adversarial_start: int = 50_001  # first step at which the discriminator acts
    ema_decay: float = 0.0
    p_no_condition: float = 0.5  # asymmetric decoder: share of pictures of which it is told nothing, in [0, 1]

    def __post_init__(self) -> None:
        _one_of("first_stage_training.lr_schedule", self.lr_schedule, ("constant", "cosine"))


@dataclass
class LoggingConfig:
    """What a run writes beside its checkpoints."""

    loggers: list[str] = field(default_factory=lambda: ["tensorboard", "csv"])  # also wandb
    wandb_project: str = "paint-by-example"
    image_every: int = 5000  # steps between image grids; 0 switches them off
    num_images: int = 4
    sampler_steps: int = 50
    guidance_scale: float = 5.0
    checkpoint_every: int = 5000  # steps
    keep_last: int = 2  # periodic checkpoints kept beside `last` and `best`

    def __post_init__(self) -> None:
        for name in self.loggers:
            _one_of("logging.loggers", name, ("tensorboard", "csv", "wandb"))


@dataclass
class Config:
    """A run: one model, one data source, one trainer."""

    stage: str = "diffusion"  # what is trained: diffusion | first_stage
    seed: int = 23  # of weights, data order and noise
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    first_stage_training: FirstStageTrainingConfig = field(default_factory=FirstStageTrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # keyword arguments of Lightning's Trainer

    def __post_init__(self) -> None:
        _one_of("stage", self.stage, ("diffusion", "first_stage"))


def load_config(*sources: str | Path | DictConfig | Config, overrides: Iterable[str] = ()) -> Config:
    """Merge config files (later ones win) and dotlist overrides into a validated `Config`.

    Args:
        sources: YAML paths, OmegaConf nodes or `Config` objects, merged from left to right.
        overrides: `section.key=value` strings, applied last.

    Raises:
        ConfigError: a file is missing or is not YAML, a key is unknown, or a value has the wrong type.
    """
    config = OmegaConf.structured(Config)
    for source in sources:
        if isinstance(source, (str, Path)):
            config = _merge(config, _read_yaml(Path(source)), str(source))
        else:
            config = _merge(config, OmegaConf.structured(source), "config")
    for override in overrides:
        config = _merge(config, _read_override(override), f"override {override!r}")
    try:
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # a value that refers to another one which is not there
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}; give it a value") from error
    assert isinstance(loaded, Config)
    return loaded


def dump_config(config: Config) -> str:
    """The config as YAML, every default written out; `load_config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: Path) -> DictConfig:
    try:
        node = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; configs/ holds the ones that come with the project") from None
    except Exception as error:  # PyYAML's errors share no base with OmegaConf's
        raise ConfigError(f"{path}: not a readable YAML file: {_one_line(error)}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path}: expected a mapping with the sections model, data, training, …")
    return node


def _read_override(override: str) -> DictConfig:
    if "=" not in override:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # as above
        raise ConfigError(f"override {override!r}: not a YAML value: {_one_line(error)}") from error


def _merge(config: DictConfig, node: DictConfig, source: str) -> DictConfig:
    for section, names in RENAMED.items():
        values = node.get(section)
        for old in names.keys() & values.keys() if isinstance(values, DictConfig) else ():
            values[names[old]] = values.pop(old)
    try:
        merged = OmegaConf.merge(config, node)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = error.full_key or "config"
        raise ConfigError(f"{source}: {key}: {reason}; see ldm/config.py for the keys") from error
    assert isinstance(merged, DictConfig)
    return merged


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

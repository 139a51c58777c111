"""Configs: what is merged, what is refused, and that nothing is lost on the way to disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ldm.config import Config, ConfigError, dump_config, load_config

CONFIGS = Path(__file__).parent.parent / "configs"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_are_the_papers() -> None:
    config = load_config()
    assert config == Config()
    assert config.model.unet.in_channels == 9
    assert (config.model.schedule.linear_start, config.model.schedule.linear_end) == (0.00085, 0.012)
    assert (config.training.base_lr, config.training.p_uncond) == (1e-5, 0.2)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_bundled_configs_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(written(tmp_path / "copy.yaml", dump_config(config))) == config


def test_dump_writes_every_default_out() -> None:
    assert OmegaConf.to_container(OmegaConf.create(dump_config(Config()))) == OmegaConf.to_container(
        OmegaConf.structured(Config)
    )


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    first = written(tmp_path / "a.yaml", "model: {image_size: 64, unet: {model_channels: 32, num_heads: 4}}\n")
    second = written(tmp_path / "b.yaml", "model: {unet: {model_channels: 96, channel_mult: [1, 3]}}\n")
    config = load_config(first, second, overrides=["model.unet.num_heads=2", "trainer.max_steps=7"])
    assert config.model.image_size == 64
    assert config.model.unet.model_channels == 96
    assert config.model.unet.channel_mult == [1, 3]  # lists are replaced, not joined
    assert config.model.unet.num_heads == 2
    assert config.trainer == {"max_steps": 7}
    assert load_config(second, first).model.unet.model_channels == 32


def test_sources_of_any_kind(tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", "model: {image_size: 64}\n")
    config = load_config(str(path), OmegaConf.create({"stage": "first_stage"}))
    assert (config.model.image_size, config.stage) == (64, "first_stage")
    assert load_config(config, overrides=["data.batch_size=3"]).data.batch_size == 3
    assert config.data.batch_size == Config().data.batch_size  # what was passed in is left as it was


@settings(deadline=None, max_examples=5)
@given(st.floats(1e-8, 1.0), st.integers(1, 10_000), st.lists(st.integers(1, 8), min_size=1, max_size=5))
def test_values_survive_overrides_and_merging(lr: float, size: int, ch_mult: list[int]) -> None:
    overrides = [f"training.base_lr={lr!r}", f"model.image_size={size}", f"model.first_stage.ch_mult={ch_mult}"]
    config = load_config(overrides=overrides)
    assert (config.training.base_lr, config.model.image_size, config.model.first_stage.ch_mult) == (lr, size, ch_mult)
    assert load_config(OmegaConf.structured(config)) == config


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("model: {unet: {modle_channels: 32}}\n", "a.yaml: model.unet.modle_channels: "),
        ("modle: {}\n", "a.yaml: modle: "),
        ("model: {image_size: big}\n", "a.yaml: model.image_size: "),
        ("model: {unet: {channel_mult: 4}}\n", "a.yaml: model.unet.channel_mult: "),
        ("model: 3\n", "a.yaml: "),
        ("stage: third\n", "stage: got 'third', expected one of diffusion, first_stage"),
        ("model: {parameterization: z}\n", "model.parameterization: got 'z', expected one of eps, v, x0"),
        ("model: {schedule: {name: sine}}\n", "model.schedule.name: got 'sine', expected one of scaled_linear"),
        ("model: {input_channels: [x_t, sky]}\n", "model.input_channels: got 'sky', expected one of x_t, z_masked"),
        ("training: {null_drop: never}\n", "training.null_drop: got 'never'"),
        ("data: {kind: zip}\n", "data.kind: got 'zip', expected one of open_images, coco, voc"),
        ("- model\n- data\n", "a.yaml: "),
        ("model: {image_size: [1\n", "a.yaml: "),
        ("model:\n  image_size: ${nothing}\n", "model.image_size: "),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, names: str) -> None:
    path = written(tmp_path / "a.yaml", text)
    with pytest.raises(ConfigError, match=re.escape(names)) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("data.batchsize=3", "override 'data.batchsize=3': data.batchsize: "),
        ("data.batch_size=many", "override 'data.batch_size=many': data.batch_size: "),
        ("data.batch_size=[3", "override 'data.batch_size=[3': "),
        ("data.batch_size", "override 'data.batch_size': "),
        ("data.batch_size=0", "data.batch_size: got 0, expected >= 1"),
        ("data.p_arbitrary_mask=-0.1", "data.p_arbitrary_mask: got -0.1, expected >= 0 and <= 1"),
        ("data.crop_margin_range=[0.5,0.1]", "data.crop_margin_range: got [0.5, 0.1]"),
        ("data.crop_margin_range=[0.5]", "data.crop_margin_range: got [0.5]"),
        ("data.crop_margin_range=[0,0.5]", "data.crop_margin_range: got 0.0, expected > 0"),
        ("model.crop_margin=-1", "model.crop_margin: got -1.0, expected >= 0"),
        ("model.first_stage.decoder_res_blocks=0", "model.first_stage.decoder_res_blocks: got 0, expected >= 1"),
        ("model.schedule.num_timesteps=0", "model.schedule.num_timesteps: got 0, expected >= 1"),
        ("model.schedule.linear_end=1.0", "model.schedule.linear_end: got 1.0"),
        ("training.min_snr_gamma=-1", "training.min_snr_gamma: got -1.0, expected >= 0"),
        ("training.p_uncond=1.5", "training.p_uncond: got 1.5, expected >= 0 and <= 1"),
        ("training.ema_decay=1", "training.ema_decay: got 1.0, expected >= 0 and < 1"),
        ("training.warmup_steps=-1", "training.warmup_steps: got -1, expected >= 0"),
        ("training.lr_schedule=step", "training.lr_schedule: got 'step', expected one of constant, cosine"),
        ("logging.loggers=[csv,mlflow]", "logging.loggers: got 'mlflow', expected one of tensorboard, csv, wandb"),
    ],
)
def test_overrides_that_cannot_be_used(override: str, names: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(names)) as caught:
        load_config(overrides=[override])
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: "):
        load_config(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}: ")):
        load_config(tmp_path)  # a folder
    assert load_config(written(tmp_path / "empty.yaml", "")) == Config()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.p_uncond=20", "0.2"),
        ("training.ema_decay=1.5", "< 1"),
        ("training.base_lr=4.5", "<= 1"),
        ("training.weight_decay=.inf", "finite"),
        ("logging.guidance_scale=.nan", "finite"),
        ("seed=18446744073709551616", "seed"),
        ("trainer.max_steps=0", "-1"),
        ("trainer.max_epochs=-2", "-1"),
        ("trainer.max_epochs=1.5", "whole"),
        ("trainer.max_epochs=many", "whole"),
        ("trainer.accumulate_grad_batches=0", ">= 1"),
        ("trainer.check_val_every_n_epoch=0", ">= 1"),
        ("trainer.check_val_every_n_epoch=-1", ">= 1"),
        ("trainer.log_every_n_steps=-1", ">= 0"),
        ("trainer.gradient_clip_val=-1", "> 0"),
        ("trainer.val_check_interval=0", "> 0"),
    ],
)
def test_values_out_of_range_are_named(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[override])
    key = override.split("=")[0]
    assert key.split(".")[-1] in str(error.value) and says in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_numbers_of_the_trainer_may_be_written_as_floats() -> None:
    trainer = load_config(overrides=["trainer.max_steps=1e3", "trainer.max_epochs=null"]).trainer
    assert trainer == {"max_steps": 1000, "max_epochs": None} and isinstance(trainer["max_steps"], int)
    assert load_config(overrides=["trainer.max_epochs=-1"]).trainer == {"max_epochs": -1}


@settings(max_examples=5)
@given(st.integers(-(2**63), 2**64 - 1))
def test_seeds_are_any_64_bits_signed_or_unsigned(seed: int) -> None:
    config = load_config(overrides=[f"seed={seed}"])
    assert 0 <= config.seed < 2**64 and (config.seed - seed) % 2**64 == 0
    assert load_config(OmegaConf.create(dump_config(config))) == config


def test_old_names_of_keys_are_read() -> None:
    config = load_config(
        OmegaConf.create({"data": {"exact_mask_percent": 0.5}}), overrides=["data.arbitrary_mask_percent=0.25"]
    )
    assert (config.data.p_object_mask, config.data.p_arbitrary_mask) == (0.5, 0.25)

"""Relighting: the published algebra over diffusers' components, and what the settings do."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.convert import to_diffusers
from ldm.checkpoint.io import read_checkpoint, write_safetensors
from ldm.checkpoint.keys import INPUT_CONV, UNET, to_file_keys
from ldm.config import Config, dump_config, load_config
from ldm.editing.editor import Editor, NotFiniteError
from ldm.editing.relight import Relighter, gradient, on_grey, working_size
from ldm.files import UserError
from ldm.images import tensor_to_pil
from ldm.latent_diffusion import LatentDiffusion
from scripts import merge_checkpoints, modify_checkpoints
from scripts import relight as relight_command

CHANNELS = {8: ["x_t", "z_foreground"], 12: ["x_t", "z_foreground", "z_background"]}


def make_relighter(config: Config, tokenizer: Path, channels: int) -> Relighter:
    torch.manual_seed(0)
    unet = replace(config.model.unet, in_channels=channels)
    model = LatentDiffusion(replace(config.model, unet=unet, input_channels=CHANNELS[channels], image_size=64))
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    model.text_encoder.find_tokenizer(tokenizer)
    return Relighter(model.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def foreground_relighter(text_config: Config, tokenizer_folder: Path) -> Relighter:
    return make_relighter(text_config, tokenizer_folder, 8)


@pytest.fixture(scope="module")
def background_relighter(text_config: Config, tokenizer_folder: Path) -> Relighter:
    return make_relighter(text_config, tokenizer_folder, 12)


@pytest.fixture(scope="module")
def foreground() -> Image.Image:
    """64 x 64, opaque in the middle."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    alpha = Image.new("L", picture.size)
    alpha.paste(255, (16, 8, 48, 60))
    picture.putalpha(alpha)
    return picture


@pytest.mark.parametrize("passes", [1, 2])
def test_what_is_not_finite_is_an_error(foreground_relighter: Relighter, foreground: Image.Image, passes: int) -> None:
    model = deepcopy(foreground_relighter.model)
    model.get_parameter("first_stage_model.decoder.conv_out.bias").data[0] = torch.nan
    with pytest.raises(NotFiniteError, match="conv_out"):
        Relighter(model).relight(foreground, num_steps=1, highres_strength=0.5 * (passes - 1))


def published(relighter: Relighter, foreground: Image.Image, background: Image.Image | None, **call: Any) -> Tensor:
    """The algebra of the published demonstration in diffusers' parts: the UNet's forward is hooked, its input widened.

    Returns:
        (1, 3, 64, 64) in [-1, 1].
    """
    import diffusers

    model = relighter.model
    parts = to_diffusers({name: t for name, t in model.state_dict().items() if not name.startswith("text_encoder.")})
    sizes: dict[str, Any] = dict(norm_num_groups=32, layers_per_block=1)
    unet = diffusers.UNet2DConditionModel(
        in_channels=model.config.unet.in_channels,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=8,
        cross_attention_dim=16,
        **sizes,
    )
    unet.load_state_dict(parts["unet"])
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32),
        latent_channels=4,
        **sizes,
    )
    vae.load_state_dict(parts["vae"])
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )

    def encoded(picture: Image.Image) -> Tensor:
        levels = torch.from_numpy(np.array(picture)).float() / 127.0 - 1.0
        return vae.encode(levels.movedim(-1, 0)[None]).latent_dist.mode() * model.config.scale_factor

    matte = np.asarray(foreground)[..., 3:] / 255.0
    cut_out = Image.fromarray((127 + (np.asarray(foreground)[..., :3] - 127.0) * matte).astype(np.uint8))
    concat = torch.cat([encoded(picture) for picture in (cut_out, background) if picture], dim=1)
    context = torch.cat([model.encode_text(["cat"]), model.encode_text(["a dog"])])
    with torch.no_grad():
        scheduler.set_timesteps(call["steps"])
        timesteps, x = scheduler.timesteps, call["noise"]
        if "initial" in call:
            timesteps = timesteps[len(timesteps) - round(call["steps"] * call["strength"]) :]
            x = scheduler.add_noise(encoded(call["initial"]), x, timesteps[:1])
        for t in timesteps:
            wide = torch.cat([torch.cat([x, concat], dim=1)] * 2)
            null, text = unet.eval()(wide, t, context).sample.chunk(2)
            x = scheduler.step(null + 2.0 * (text - null), t, x).prev_sample
        return vae.decode(x / model.config.scale_factor).sample


def as_levels(picture: Any) -> np.ndarray:
    assert isinstance(picture, Image.Image)
    return np.asarray(picture).astype(int)


OPTIONS: dict[str, Any] = dict(
    prompt="a dog", negative_prompt="cat", sampler="ddim", guidance_scale=2.0, seed=5, highres_strength=0
)


def noise() -> Tensor:
    return torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(5))[None]


@pytest.mark.parametrize("light", ["none", "left"])
def test_of_a_foreground_as_published(foreground_relighter: Relighter, foreground: Image.Image, light: str) -> None:
    """A grey level of tolerance: 2e-5 of two implementations' rounding can tip one over."""
    call: dict[str, Any] = dict(steps=4, noise=noise())
    if light != "none":  # of eight steps those from half of the noise on
        call |= dict(steps=8, strength=0.5, initial=gradient((64, 64), "left", (255, 0)))
    (expected,) = published(foreground_relighter, foreground, None, **call)
    got = foreground_relighter.relight(foreground, light=light, strength=0.5, num_steps=4, **OPTIONS)
    assert np.abs(as_levels(got) - as_levels(tensor_to_pil(expected))).max() <= 1


def test_of_foreground_and_background_as_published(background_relighter: Relighter, foreground: Image.Image) -> None:
    background = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (expected,) = published(background_relighter, foreground, background, steps=4, noise=noise())
    got = background_relighter.relight(foreground, background=background, num_steps=4, **OPTIONS)
    assert np.abs(as_levels(got) - as_levels(tensor_to_pil(expected))).max() <= 1


@pytest.mark.parametrize("channels", [8, 12])
def test_full_size_configs(channels: int) -> None:
    name = {8: "iclight-fc.yaml", 12: "iclight-fbc.yaml"}[channels]
    with torch.device("meta"):
        model = LatentDiffusion(load_config(Path(__file__).parents[2] / "configs" / name).model)
    assert model.state_dict()[INPUT_CONV].shape == (320, channels, 3, 3)
    assert Relighter(model).reads_background is (channels == 12)


def test_made_of_stable_diffusion_and_an_offset(foreground_relighter: Relighter, tmp_path: Path) -> None:
    """As the guide says: four channels inflated to eight, plus a difference under diffusers' names."""
    state = to_file_keys(foreground_relighter.model.state_dict())
    unet = {name: tensor for name, tensor in state.items() if name.startswith(UNET)}
    torch.manual_seed(1)
    offset = {name: 0.01 * torch.randn_like(tensor) for name, tensor in unet.items()}  # as of fine-tuning
    offset[INPUT_CONV][:, 4:] = unet[INPUT_CONV][:, 4:]
    base = state | {name: tensor - offset[name] for name, tensor in unet.items()}
    base[INPUT_CONV] = base[INPUT_CONV][:, :4].contiguous()
    write_safetensors(tmp_path / "sd.safetensors", base)
    write_safetensors(tmp_path / "offset.safetensors", to_diffusers(offset)["unet"])
    wide, out = tmp_path / "wide.safetensors", tmp_path / "iclight.safetensors"
    assert modify_checkpoints.main([str(tmp_path / "sd.safetensors"), str(wide), "--in-channels", "8"]) == 0
    assert merge_checkpoints.main(["offset", str(wide), str(tmp_path / "offset.safetensors"), str(out)]) == 0
    made = read_checkpoint(out)
    assert made.keys() == state.keys()
    for name, tensor in state.items():  # one subtraction and one addition in float32 of numbers up to 5
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-6)


def test_the_second_pass_enlarges(foreground_relighter: Relighter, foreground: Image.Image) -> None:
    options = OPTIONS | dict(num_steps=2, seed=[3, 4], highres_strength=0.5)
    two = foreground_relighter.relight(foreground, size=(128, 70), highres_scale=1.5, **options)
    assert isinstance(two, list) and [picture.size for picture in two] == [(192, 128)] * 2  # 96 is rounded to even
    assert not np.array_equal(as_levels(two[0]), as_levels(two[1]))
    alone = foreground_relighter.relight(foreground, size=(128, 64), highres_scale=1.5, **options | dict(seed=4))
    assert np.abs(as_levels(two[1]) - as_levels(alone)).max() <= 1


def test_what_is_behind_decides(background_relighter: Relighter, foreground: Image.Image) -> None:
    options = OPTIONS | dict(num_steps=2)
    results = [background_relighter.relight(foreground, light=light, **options) for light in ("none", "left", "right")]
    ambient = background_relighter.relight(foreground, background=Image.new("RGB", (9, 9), (64,) * 3), **options)
    assert np.array_equal(as_levels(results[0]), as_levels(ambient))
    assert len({as_levels(picture).tobytes() for picture in results}) == 3


def test_command_line(
    foreground_relighter: Relighter,
    foreground: Image.Image,
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = foreground_relighter.model
    write_safetensors(tmp_path / "model.safetensors", to_file_keys(model.state_dict()))
    (tmp_path / "config.yaml").write_text(dump_config(Config(model=model.config)))
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    foreground.save(tmp_path / "cup.png")
    words = ["--image", str(tmp_path / "cup.png"), "--checkpoint", str(tmp_path)]
    words += ["--device", "cpu", "--outdir", str(tmp_path / "out"), "--steps", "2", "--seed", "3"]
    words += ["--prompt", "a dog", "--negative-prompt", "cat", "--light", "left"]
    assert relight_command.main(words) == 0
    expected = foreground_relighter.relight(
        foreground, "a dog", negative_prompt="cat", light="left", num_steps=2, seed=3
    )
    with Image.open(tmp_path / "out" / "cup_relit_3.png") as result:
        assert np.abs(as_levels(result) - as_levels(expected)).max() <= 1  # float32 of another batch
        parameters = json.loads(result.text["parameters"])  # pyright: ignore[reportAttributeAccessIssue]
    assert parameters["mode"] == "relight" and parameters["light"] == "left" and parameters["seed"] == 3
    assert relight_command.main([*words, "--background", str(tmp_path / "cup.png")]) == 2
    assert "background" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        relight_command.main([*words, "--size", "0,0"])
    assert "--size: got (0.0, 0.0)" in capsys.readouterr().err


def test_images() -> None:
    half = Image.new("RGBA", (4, 4), (227, 27, 127, 128))
    assert on_grey(half).getpixel((0, 0)) == (177, 77, 127)
    assert on_grey(half, Image.new("L", (4, 4), 255)).getpixel((0, 0)) == (227, 27, 127)
    for light, lit in (("left", (0, 2)), ("right", (6, 2)), ("top", (3, 0)), ("bottom", (3, 4))):
        lights = gradient((7, 5), light, (224, 32))
        levels = np.asarray(lights)[..., 0]
        assert lights.getpixel(lit) == (224,) * 3 == (levels.max(),) * 3 and levels.min() == 32, light
    assert working_size((3000, 2000), 512) == (640, 448)
    for thin in ((60000, 3), (1, 5000)):
        with pytest.raises(UserError, match=f"{thin[0]} x {thin[1]}"):
            working_size(thin, 512)
    with pytest.raises(UserError, match="foreground"):
        on_grey(half, Image.new("L", (4, 4)))
    with pytest.raises(UserError, match="9 x 3, the foreground 4 x 4"):
        on_grey(half, Image.new("L", (9, 3), 255))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"light": "above"}, "light: got 'above'"),
        ({"feather": 3}, "the setting feather"),
        ({"num_steps": 0}, "num_steps: got 0"),
        ({"background": Image.new("RGB", (9, 9))}, "a model that reads none"),
        ({"highres_scale": 0.5}, "highres_scale=0.5, expected"),
        ({"highres_strength": 2}, "highres_strength=2"),
    ],
)
def test_wrong_settings(
    foreground_relighter: Relighter, foreground: Image.Image, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        foreground_relighter.relight(foreground, **options)


def test_models_for_something_else(foreground_relighter: Relighter, text_folder: Path) -> None:
    hole = Image.new("L", (8, 8), 255)
    with pytest.raises(UserError, match="relighting"):
        Editor(foreground_relighter.model).edit(Image.new("RGB", (8, 8)), hole, prompt="a dog")
    with pytest.raises(UserError, match="relighting"):
        Relighter(Editor.from_pretrained(text_folder).model)

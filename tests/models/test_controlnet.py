"""Control networks: diffusers' numbers from either layout, and what they do to an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import inference
from ldm.checkpoint.io import CheckpointError, write_safetensors
from ldm.checkpoint.keys import UNET, to_file_keys
from ldm.config import Config, UNetConfig, dump_config, load_config
from ldm.editing.editor import Editor
from ldm.files import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.controlnet import CONTROL, Control, ControlNet, Steering, control_state, load_controlnet
from ldm.models.unet import UNetModel

SIZES = UNetConfig(
    in_channels=9,
    model_channels=32,
    channel_mult=[1, 2],
    num_res_blocks=1,
    attention_resolutions=[1, 2],
    context_dim=16,
)
LEVELS: dict[str, Any] = dict(
    block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8, norm_num_groups=32
)


def randomized(module: torch.nn.Module, seed: int) -> Any:
    """Weights of which none is zero, as those of control networks are at first."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def peer() -> Any:
    diffusers = pytest.importorskip("diffusers")
    return randomized(diffusers.ControlNetModel(down_block_types=("CrossAttnDownBlock2D",) * 2, **LEVELS), 0)


@pytest.fixture(scope="module")
def file(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    peer.save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def network(file: Path) -> ControlNet:
    return load_controlnet(file, SIZES)


@pytest.fixture(scope="module")
def call() -> dict[str, Tensor]:
    """x_t, t, context and picture of a call for two samples."""
    torch.manual_seed(0)
    x_t, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    return dict(x_t=x_t, t=torch.tensor([3, 800]), context=context, picture=torch.rand(2, 3, 64, 64))


@pytest.mark.parametrize("guess_mode", [False, True])
def test_residuals_are_diffusers(network: ControlNet, peer: Any, call: dict[str, Tensor], guess_mode: bool) -> None:
    x_t, context, picture = call["x_t"], call["context"], call["picture"]
    down, middle = peer(x_t, 800, context, picture, 0.7, guess_mode=guess_mode, return_dict=False)
    steering = Steering([Control(network, "", 0.7, guess_mode)], [picture], torch.float32)
    residuals = steering.prepare([3, 800], context)(x_t, 800, guided=False)
    for got, expected in zip(residuals, [*down, middle], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)  # float32 and other kernels


def test_the_unet_takes_them_as_diffusers_does(network: ControlNet, call: dict[str, Tensor]) -> None:
    """The UNet has nine channels, the control network sees the first four."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ours = randomized(UNetModel(SIZES), 1)
    theirs = diffusers.UNet2DConditionModel(
        in_channels=9,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        **LEVELS,
    ).requires_grad_(False)
    state = {UNET + name: tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(state, theirs.config))
    x = torch.cat([call["x_t"], torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(2))], dim=1)
    *down, middle = network(call["x_t"], call["t"], call["context"], network.input_hint_block(call["picture"]))
    got = ours(x, call["t"], call["context"], [*down, middle])
    expected = theirs.eval()(
        x,
        call["t"],
        call["context"],
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)  # values up to 4
    assert (got - ours(x, call["t"], call["context"])).abs().max() > 0.1


@pytest.mark.parametrize("prefix", [CONTROL, ""])
def test_the_published_layout(network: ControlNet, call: dict[str, Tensor], prefix: str, tmp_path: Path) -> None:
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    if prefix:
        state[UNET + "out.2.bias"] = torch.zeros(4)  # the first files held the steered model, too
    save_file(state, tmp_path / "control.safetensors")
    again = load_controlnet(tmp_path / "control.safetensors", SIZES)
    args = call["x_t"], call["t"], call["context"]
    for a, b in zip(network(*args, torch.zeros(1)), again(*args, torch.zeros(1)), strict=True):
        assert torch.equal(a, b)


def test_full_size_names_and_shapes() -> None:
    """Of diffusers' defaults, which are ControlNet's for Stable Diffusion v1; nothing of it is in memory."""
    import diffusers

    config = load_config(Path(__file__).parents[2] / "configs" / "inpaint-text.yaml").model.unet
    with torch.device("meta"):
        theirs, ours = diffusers.ControlNetModel(cross_attention_dim=768), ControlNet(config)
    state = control_state(theirs.state_dict(), "diffusers")
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == shapes


def test_a_folder_of_diffusers(file: Path, network: ControlNet) -> None:
    state = load_controlnet(file.parent, SIZES).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_that_are_none(network: ControlNet, scale: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number"):
        Control(network, "", scale)


def test_files_that_are_none(file: Path, tmp_path: Path) -> None:
    path, state = tmp_path / "other.safetensors", load_file(file)
    save_file({name: tensor for name, tensor in state.items() if "controlnet_" not in name}, path)
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        load_controlnet(path, SIZES)
    inflated = torch.nn.functional.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, 5))
    save_file({**state, "conv_in.weight": inflated}, path)
    with pytest.raises(CheckpointError, match=r"9 .*4"):
        load_controlnet(path, SIZES)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_controlnet(file, UNetConfig(model_channels=64))


def test_several_add_up_and_guess_mode_spares_the_null_branch(network: ControlNet, call: dict[str, Tensor]) -> None:
    x_t, context = call["x_t"], call["context"]
    one, two = Control(network, "", 0.5), Control(network, "", 0.25, guess_mode=True)
    pictures = [call["picture"][:1], call["picture"][1:]]
    both, first, second = (
        Steering(*of, torch.float32).prepare([3, 800], context)
        for of in (([one, two], pictures), ([one], pictures[:1]), ([two], pictures[1:]))
    )
    parts = both(x_t, 3, guided=True), first(x_t, 3, guided=True), second(x_t[1:], 3, guided=False)
    for total, a, b in zip(*parts, strict=True):
        torch.testing.assert_close(total[0], a[0])
        torch.testing.assert_close(total[1], a[1] + b[0])


# ---- edits ----


@pytest.fixture(scope="module")
def editor(text_folder: Path) -> Editor:
    """A model for text with eight pixels a latent cell."""
    given = Editor.from_pretrained(text_folder).model
    config = given.config
    config.unet, config.image_size, config.first_stage.ch_mult = SIZES, 64, [1, 1, 1, 1]
    model = LatentDiffusion(config)
    model.text_encoder.find_tokenizer(text_folder)
    return Editor(randomized(model, 3))


def test_an_edit_follows_the_picture(editor: Editor, file: Path) -> None:
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 256, (96, 120, 3), dtype=np.uint8))
    hole = Image.new("L", scene.size)
    hole.paste(255, (40, 30, 80, 70))
    network, options = editor.load_controlnet(file), dict(prompt="a", num_steps=2, seed=[0, 1])

    def edited(*controls: Control) -> np.ndarray:
        results = editor.edit(scene, hole, controls=controls, **options)
        assert isinstance(results, list)
        return np.stack([np.asarray(result) for result in results])

    black, white = (Image.new("RGB", scene.size, colour) for colour in ("black", "white"))
    plain = edited()
    assert np.array_equal(plain, edited(Control(network, white, scale=0)))
    assert not np.array_equal(edited(Control(network, white)), edited(Control(network, black)))
    assert not np.array_equal(plain, edited(Control(network, white, guess_mode=True)))
    with pytest.raises(UserError, match=r"50\D+50"):
        edited(Control(network, Image.new("RGB", (50, 50))))


def test_command_line(
    editor: Editor, file: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_safetensors(tmp_path / "model.safetensors", to_file_keys(editor.model.state_dict()))
    (tmp_path / "config.yaml").write_text(dump_config(Config(model=editor.model.config)))
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    for name, colour in (("scene", "grey"), ("edges", "white")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    words = ["--image", str(tmp_path / "scene.png"), "--box", "10,10,50,50", "--prompt", "a dog", "--steps", "2"]
    words += ["--checkpoint", str(tmp_path), "--device", "cpu", "--skip_grid", "--outdir"]
    control = ["--control", str(file), "--control-image", str(tmp_path / "edges.png")]
    runs = {"plain": [], "none": [*control, "--control-scale", "0"], "one": control, "two": 2 * control}
    made = {}
    for name, options in runs.items():
        assert inference.main([*words, str(tmp_path / name), *options]) == 0
        with Image.open(tmp_path / name / "scene_0.png") as result:
            made[name] = np.asarray(result)
    assert np.array_equal(made["plain"], made["none"])
    assert len({made[name].tobytes() for name in ("plain", "one", "two")}) == 3
    with pytest.raises(SystemExit):
        inference.main([*words, str(tmp_path / "out"), "--control", str(file)])
    assert "--control-image" in capsys.readouterr().err


def test_latents_of_another_size(text_folder: Path, file: Path) -> None:
    with pytest.raises(UserError, match="8 pixels a latent cell"):
        Editor.from_pretrained(text_folder).load_controlnet(file)

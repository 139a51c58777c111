"""Text instead of exemplars: Stable Diffusion inpainting's conventions, against diffusers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import inference
from ldm import Editor
from ldm.checkpoint.io import CheckpointError, read_checkpoint, write_safetensors
from ldm.checkpoint.keys import EMA, INPUT_CONV, SCHEDULE_BUFFERS, TEXT_TOWER, to_file_keys, to_module_keys
from ldm.config import Config, ConfigError, ExemplarEncoderConfig, load_config
from ldm.files import UserError
from ldm.images import mask_to_tensor, pil_to_tensor
from ldm.latent_diffusion import LatentDiffusion, latent_hole, load_model, load_weights
from ldm.models.layers import Uninitialised
from ldm.models.text_encoder import TextEncoder
from tests.conftest import write_tokenizer
from tests.procweights import layout

CONFIGS = Path(__file__).parents[2] / "configs"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def editor(text_folder: Path) -> Editor:
    return Editor.from_pretrained(text_folder)


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def hole() -> Image.Image:
    """Its edges lie on no edge of the latent grid of 4 px."""
    hole = Image.new("L", (32, 32))
    hole.paste(255, (7, 6, 21, 25))
    return hole


def diffusers_pipeline(model: LatentDiffusion, sampler: str) -> Any:
    """diffusers' own pipeline on the same tensors, renamed by diffusers."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils as convert
    from transformers import CLIPTextConfig, CLIPTextModel

    state, config = model.state_dict(), model.config
    factors = [2**level for level in range(len(config.unet.channel_mult))]
    with_text = ["CrossAttn" if factor in config.unet.attention_resolutions else "" for factor in factors]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=64,
            in_channels=9,
            block_out_channels=config.unet.level_channels,
            down_block_types=[f"{kind}DownBlock2D" for kind in with_text],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(with_text)],
            layers_per_block=config.unet.num_res_blocks,
            cross_attention_dim=config.unet.context_dim,
            attention_head_dim=8,
        )
        widths = [config.first_stage.ch * m for m in config.first_stage.ch_mult]
        vae = diffusers.AutoencoderKL(
            block_out_channels=widths,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            layers_per_block=config.first_stage.num_res_blocks,
            latent_channels=4,
            scaling_factor=0.18215,
        )
    unet.load_state_dict(convert.convert_ldm_unet_checkpoint(dict(state), unet.config), assign=True)
    vae.load_state_dict(convert.convert_ldm_vae_checkpoint(dict(state), vae.config), assign=True)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.text_encoder.vocab_size,
            max_position_embeddings=config.text_encoder.max_length,
            hidden_size=config.text_encoder.hidden_size,
            intermediate_size=config.text_encoder.intermediate_size,
            num_hidden_layers=config.text_encoder.num_layers,
            num_attention_heads=config.text_encoder.num_heads,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        )
    )
    text.load_state_dict(model.text_encoder.transformer.state_dict())
    schedule: dict[str, Any] = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    if sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(**schedule, clip_sample=False)
        scheduler.register_to_config(skip_prk_steps=True)  # the pipeline asks any scheduler for it
    else:
        scheduler = diffusers.PNDMScheduler(**schedule, skip_prk_steps=True)
    tokenizer = model.text_encoder.tokenizer
    tokenizer.model_max_length = config.text_encoder.max_length
    networks = vae.eval(), text.eval(), tokenizer, unet.eval()
    pipeline = diffusers.StableDiffusionInpaintPipeline(*networks, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def both_images(
    editor: Editor,
    scene: Image.Image,
    hole: Image.Image,
    sampler: str,
    num_steps: int,
    *,
    theirs: LatentDiffusion | None = None,
) -> tuple[Tensor, Tensor]:
    """Ours and diffusers' (3, S, S) in [0, 1], from the same weights (or `theirs`), noise and prompts."""
    pipeline, side = diffusers_pipeline(theirs or editor.model, sampler), scene.width
    cells = side // editor.model.downsampling
    generator = seeded(5)
    torch.randn(4, cells, cells, generator=generator)  # the masked image's posterior, drawn first
    x_T = torch.randn(1, 4, cells, cells, generator=generator)
    options: dict[str, Any] = {"guidance_scale": 7.5, "negative_prompt": "cat"}
    expected = pipeline(
        "a dog",
        scene,
        hole,
        height=side,
        width=side,
        num_inference_steps=num_steps,
        generator=seeded(5),
        latents=x_T,
        output_type="pt",
        **options,
    ).images[0]
    image, keep_mask = pil_to_tensor(scene)[None], mask_to_tensor(hole)[None]
    options |= {"sampler": sampler, "num_steps": num_steps}
    (got,) = editor.paint(image, keep_mask, None, [5], prompts=["a dog"], **options)
    return got / 2 + 0.5, expected


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_the_same_image_as_diffusers(editor: Editor, scene: Image.Image, hole: Image.Image, sampler: str) -> None:
    got, expected = both_images(editor, scene, hole, sampler, 10)
    print(f"\n{sampler}: largest difference {(got - expected).abs().max():.1e}")
    # measured: 3e-6, the rounding of twenty evaluations of two implementations
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_the_same_image_as_diffusers_with_paint_by_examples_channels(
    text_config: Config, text_folder: Path, scene: Image.Image
) -> None:
    """The input conv's weights in the other order, and of the mask those of its complement: 1 - hole_mask = keep_mask.

    The padding around a mask is 0 in either convention, hence a kernel of one pixel for it, and no bilinear edge is
    soft, hence a hole on the latent grid.
    """
    hole = Image.new("L", scene.size)
    hole.paste(255, (8, 4, 20, 24))
    theirs = load_model(text_config, text_folder / "model.safetensors")
    config = replace(text_config.model, input_channels=["x_t", "z_masked", "keep_mask"])
    ours = load_model(Config(model=config), text_folder / "model.safetensors")
    conv, reference = ours.unet.input_blocks[0][0], theirs.unet.input_blocks[0][0]
    assert isinstance(conv, nn.Conv2d) and isinstance(reference, nn.Conv2d) and conv.bias is not None
    mask = torch.zeros_like(reference.weight[:, 4:5])
    mask[:, :, 1, 1] = 0.5 + reference.weight[:, 4:5, 1, 1]
    reference.weight[:, 4:5] = mask
    conv.weight.copy_(torch.cat([reference.weight[:, :4], reference.weight[:, 5:], -mask], dim=1))
    conv.bias += mask.sum((1, 2, 3))
    got, expected = both_images(Editor(ours), scene, hole, "ddim", 4, theirs=theirs)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_the_same_image_as_diffusers_at_full_size(tmp_path: Path) -> None:
    """Every tensor of Stable Diffusion inpainting, random, at 64 px."""
    write_tokenizer(tmp_path, 49_408)
    config = load_config(
        CONFIGS / "inpaint-text.yaml", overrides=[f"model.text_encoder.tokenizer={tmp_path}", "model.image_size=64"]
    )
    with Uninitialised():
        model = LatentDiffusion(config.model)
    numbers = torch.rand(2**22, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def weight(shape: torch.Size) -> Tensor:  # a billion draws would take most of the time
        drawn = numbers[: shape.numel()]
        drawn = drawn / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 1 + 0.1 * drawn
        return drawn.repeat(-(-shape.numel() // len(drawn)))[: shape.numel()].view(shape)

    state = {name: weight(x.shape) for name, x in model.state_dict().items() if name not in SCHEDULE_BUFFERS}
    load_weights(model, state, "random", dtype=torch.float32)
    model.requires_grad_(False).eval()
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    hole = Image.new("L", scene.size)
    hole.paste(255, (13, 18, 50, 47))
    got, expected = both_images(Editor(model), scene, hole, "ddim", 2)
    assert got.std() > 0.05
    print(f"\nlargest difference {(got - expected).abs().max():.1e}")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # measured at 128 px: 1e-5, with AVX2 3.9e-5


def paint(editor: Editor, scene: Image.Image, hole: Image.Image, **options: Any) -> Tensor:
    keep_mask = mask_to_tensor(hole)[None]
    return editor.paint(pil_to_tensor(scene)[None], keep_mask, None, [0], num_steps=2, sampler="ddim", **options)


def test_prompts_count(editor: Editor, scene: Image.Image, hole: Image.Image) -> None:
    dog = paint(editor, scene, hole, prompts=["a dog"])
    assert torch.equal(paint(editor, scene, hole, prompts=["A  Dog"]), dog)  # case and spaces do not
    assert torch.equal(paint(editor, scene, hole, prompts=["a dog"], negative_prompt=""), dog)
    for other in ({"prompts": ["a cat"]}, {}, {"prompts": ["a dog"], "negative_prompt": "cat"}):
        assert (paint(editor, scene, hole, **other) - dog).abs().max() > 1e-3


def test_tokens(editor: Editor) -> None:
    encoder = editor.model.text_encoder
    start, end = 56, 57
    dog, cat, a = 53, 55, 26
    assert encoder.tokenize(["a dog", ""]).tolist() == [[start, a, dog] + [end] * 9, [start] + [end] * 11]
    with pytest.warns(UserWarning, match=r"22 .* 12"):
        cut = encoder.tokenize(["a dog " * 10])
    assert cut.tolist() == [[start, *[a, dog] * 5, end]]
    encoder.train()
    assert torch.equal(encoder.tokenize(["a dog " * 10]), cut)  # of a million captions some are long
    encoder.eval()
    assert encoder.tokenize(["cat " * 10]).tolist() == [[start, *[cat] * 10, end]]  # just fits
    # attention is causal: later tokens leave earlier ones alone
    first, second = editor.model.encode_text(["a dog"]), editor.model.encode_text(["a cat"])
    torch.testing.assert_close(first[:, :2], second[:, :2], rtol=0, atol=1e-6)
    assert (first[:, 2:] - second[:, 2:]).abs().max() > 1e-3


# --- Conventions ------------------------------------------------------------------------------------------------------


def with_channels(config: Config, *names: str, condition: str = "text") -> LatentDiffusion:
    return LatentDiffusion(replace(config.model, input_channels=list(names), condition=condition))


def test_both_orders_of_channels(text_config: Config, hole: Image.Image) -> None:
    x_t, z_masked, keep_mask = torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 2.0), mask_to_tensor(hole)[None]
    paint_by_example = with_channels(text_config, "x_t", "z_masked", "keep_mask").unet_input(x_t, z_masked, keep_mask)
    inpainting = with_channels(text_config, "x_t", "hole_mask", "z_masked").unet_input(x_t, z_masked, keep_mask)
    assert torch.equal(paint_by_example[:, :8], torch.cat([x_t, z_masked], dim=1))
    assert torch.equal(inpainting[:, [0, 1, 2, 3, 5, 6, 7, 8]], paint_by_example[:, :8])
    keep, paint = paint_by_example[:, 8], inpainting[:, 4]
    assert paint.unique().tolist() == [0, 1]
    assert keep[0, 1, 3] == 0.5 and paint[0, 1, 3] == 0  # between rows 5 and 6, where the hole begins; its row 4
    assert keep[0, 0, 0] == 1 and paint[0, 0, 0] == 0  # outside of the hole
    assert keep[0, 4, 4] == 0 and paint[0, 4, 4] == 1  # inside
    # pixels 4 i and 4 j decide for cell i, j: columns 8 to 20 and rows 8 to 24 of the hole
    assert paint[0].nonzero().amin(0).tolist() == [2, 2] and paint[0].nonzero().amax(0).tolist() == [6, 5]


def test_a_model_that_sees_no_scene(text_config: Config) -> None:
    """Stable Diffusion as it is, before inpainting."""
    unet = replace(text_config.model.unet, in_channels=4)
    model = LatentDiffusion(replace(text_config.model, input_channels=["x_t"], unet=unet))
    x_t = torch.randn(1, 4, 8, 8)
    assert torch.equal(model.unet_input(x_t, torch.zeros_like(x_t), torch.ones(1, 1, 32, 32)), x_t)


def test_the_hole_is_cut_at_a_half(text_config: Config) -> None:
    soft = torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0]).repeat_interleave(4).expand(1, 1, 20, 20)
    assert latent_hole(soft, torch.zeros(1, 4, 5, 5))[0, 0, 0].tolist() == [1, 1, 1, 0, 0]  # as diffusers' >= 0.5


@pytest.mark.parametrize(
    ("names", "in_channels", "message"),
    [
        (["x_t", "z_masked"], 9, r"model\.unet\.in_channels: got 9, expected 8 \(x_t 4 \+ z_masked 4, see"),
        (["z_masked", "x_t"], 8, "model.input_channels: .*expected x_t first"),
        (["x_t", "x_t"], 8, "model.input_channels: .*no name twice"),
        (["x_t", "mask"], 5, "model.input_channels: got 'mask', expected one of x_t, z_masked, keep_mask, hole_mask"),
    ],
)
def test_impossible_channels(text_config: Config, names: list[str], in_channels: int, message: str) -> None:
    unet = replace(text_config.model.unet, in_channels=in_channels)
    with pytest.raises(ConfigError, match=message):
        LatentDiffusion(replace(text_config.model, input_channels=names, unet=unet))


def test_exemplar_and_text_together(text_config: Config, tokenizer_folder: Path) -> None:
    """As many tokens as both have, and each counts."""
    exemplar = ExemplarEncoderConfig(
        image_size=14, patch_size=7, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, mapper_layers=1
    )
    text = replace(text_config.model.text_encoder, tokenizer=str(tokenizer_folder))
    config = replace(text_config.model, condition="both", exemplar_encoder=exemplar, text_encoder=text)
    torch.manual_seed(0)
    editor = Editor(load_model(Config(model=config)))
    model, picture = editor.model, torch.randn(1, 3, 14, 14, generator=seeded(0))
    tokens = model.encode_exemplar(picture)
    assert torch.equal(model.context(tokens, ["dog"]), torch.cat([tokens, model.encode_text(["dog"])], dim=1))
    assert torch.equal(model.context(None, ["dog", "cat"])[:, :1], model.learnable_vector.expand(2, -1, -1))
    assert torch.equal(model.null_context()[:, 1:], model.encode_text([""]))
    assert not model.single_token
    for block in (m for m in model.modules() if isinstance(m, nn.Conv2d) and not m.weight.any()):
        nn.init.normal_(block.weight, std=0.1, generator=seeded(1))
    given = {"exemplar": Image.new("RGB", (9, 9), "red"), "prompt": "a dog"}
    scene, hole = Image.new("RGB", (32, 32), "grey"), Image.new("L", (32, 32), 255)
    options: dict[str, Any] = {"num_steps": 2, "sampler": "ddim"}
    results = [
        editor.edit(scene, hole, **chosen, **options)
        for chosen in (given, {**given, "prompt": None}, {**given, "exemplar": None}, {})
    ]
    pixels = [np.asarray(result) for result in results]
    assert all((a != b).any() for a, b in combinations(pixels, 2))
    with pytest.raises(ConfigError, match="tokens: got 'all'"):
        replace(config, exemplar_encoder=replace(exemplar, tokens="all"))


# --- Loading ----------------------------------------------------------------------------------------------------------


def test_stable_diffusion_inpaintings_file_at_full_size() -> None:
    """The published names and shapes of v1-4, but for the five further input channels that inpainting has."""
    published = {name: tuple(tensor.shape) for name, tensor in layout("sd_v1_4").items() if not name.startswith(EMA)}
    published[INPUT_CONV] = (320, 9, 3, 3)
    with torch.device("meta"):
        model = LatentDiffusion(load_config(CONFIGS / "inpaint-text.yaml").model)
    assert {name: tuple(t.shape) for name, t in to_file_keys(model.state_dict()).items()} == published
    theirs = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    modules = {name: tensor.shape for name, tensor in to_module_keys(theirs).items()}
    assert modules == {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_a_ckpt_loads_strictly(text_config: Config, text_folder: Path, tmp_path: Path) -> None:
    state = read_checkpoint(text_folder / "model.safetensors")
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert state[position_ids].tolist() == [list(range(12))]
    ema = {"model_ema.decay": torch.tensor(0.9999)}  # which a pruned file still has
    torch.save({"state_dict": {**state, **ema}, "global_step": 440_000}, tmp_path / "model.ckpt")
    model = load_model(text_config, tmp_path / "model.ckpt")
    assert torch.equal(
        model.text_encoder.transformer.final_layer_norm.weight, state[f"{TEXT_TOWER}final_layer_norm.weight"]
    )
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    with pytest.raises(UserError, match=r"vocab\.json .*merges\.txt"):
        model.encode_text(["a dog"])


def test_wrong_files(text_config: Config, text_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    state = read_checkpoint(text_folder / "model.safetensors")
    path = tmp_path / "model.safetensors"
    for config, spoilt, message in (
        (text_config, {n: t for n, t in state.items() if "fc1.bias" not in n}, r"2 missing:\s+text_encoder\.tran"),
        (
            text_config,
            {**state, INPUT_CONV: state[INPUT_CONV][:, :4]},
            r"modify_checkpoints\.py IN OUT --in-channels 9",
        ),
        (text_config, read_checkpoint(tiny_folder / "model.safetensors"), r"Paint by Example; .*configs/v1\.yaml"),
        (tiny_folder / "config.yaml", state, r"configs/inpaint-text\.yaml"),
    ):
        write_safetensors(path, spoilt)
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            load_model(config, path)


def test_wrong_tokenizers(text_config: Config, text_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    encoder = replace(text_config.model.text_encoder, vocab_size=60, tokenizer=str(tokenizer_folder))
    with pytest.raises(UserError, match=r"58 .* 60"):
        TextEncoder(encoder).tokenize(["dog"])
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "vocab.json").write_text("<html>")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        TextEncoder(replace(encoder, tokenizer=str(tmp_path))).tokenize(["dog"])
    with pytest.raises(ConfigError, match=r"text_encoder\.hidden_size: got 32, .*context_dim, 16"):
        LatentDiffusion(replace(text_config.model, text_encoder=replace(encoder, hidden_size=32)))


def test_what_a_model_does_not_read(editor: Editor, tiny_folder: Path, scene: Image.Image, hole: Image.Image) -> None:
    with pytest.raises(UserError, match=r"exemplar .* text"):
        editor.edit(scene, hole, scene)
    with pytest.raises(UserError, match=r"prompt .* exemplars"):
        Editor.from_pretrained(tiny_folder).edit(scene, hole, negative_prompt="blurred")


# --- Command line -----------------------------------------------------------------------------------------------------


def test_a_prompt_on_the_command_line(
    editor: Editor, text_folder: Path, scene: Image.Image, hole: Image.Image, tmp_path: Path
) -> None:
    scene.save(tmp_path / "scene.png")
    hole.save(tmp_path / "hole.png")
    words = ["--image", str(tmp_path / "scene.png"), "--mask", str(tmp_path / "hole.png"), "--steps", "2"]
    words += ["--checkpoint", str(text_folder), "--device", "cpu", "--outdir", str(tmp_path / "out")]
    words += ["--prompt", "a dog", "--negative-prompt", "cat", "--seed", "3"]
    assert inference.main(words) == 0
    expected = editor.edit(scene, hole, prompt="a dog", negative_prompt="cat", seed=3, num_steps=2)
    with Image.open(tmp_path / "out" / "scene_3.png") as result:
        settings = json.loads(result.text["parameters"])  # pyright: ignore[reportAttributeAccessIssue]
        assert np.array_equal(np.asarray(result), np.asarray(expected))
    assert (settings["prompt"], settings["negative_prompt"], settings["reference"]) == ("a dog", "cat", [])
    assert (tmp_path / "out" / "scene_3_grid.png").is_file()
    assert inference.main([*words, "--separate"]) == 0  # parts one by one, here one


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a dog"], "--image, --mask and --reference"),
        (
            ["--image", "{scene}", "--box", "2,2,9,9", "--prompt", "a dog", "--rank"],
            "--sort-by-similarity",
        ),
        (
            ["--image", "{scene}", "--box", "2,2,9,9", "--reference", "{scene}"],
            "got an exemplar for a model that reads",
        ),
    ],
)
def test_wrong_words(
    text_folder: Path,
    scene: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    scene.save(tmp_path / "scene.png")
    words = [word.format(scene=tmp_path / "scene.png") for word in words]
    try:
        status = inference.main(
            [*words, "--checkpoint", str(text_folder), "--outdir", str(tmp_path), "--device", "cpu"]
        )
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and message in capsys.readouterr().err

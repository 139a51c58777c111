"""A decoder that sees the pixels that are kept, given to the editor, the command lines and the benchmark."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import inference
from ldm.checkpoint.io import read_checkpoint, write_safetensors
from ldm.config import load_config
from ldm.editing.editor import Editor
from ldm.latent_diffusion import load_model
from ldm.models.autoencoder import AutoencoderKL, MaskConditionedDecoder

NAMED = ("model.first_stage.decoder=asymmetric", "model.first_stage.decoder_width=2.0")
FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the tiny model's encoder: twice as wide, random."""
    torch.manual_seed(1)
    model = AutoencoderKL(load_config(tiny_folder / "config.yaml", overrides=NAMED).model.first_stage)
    own = load_model(tiny_folder / "config.yaml", tiny_folder / "model.safetensors").first_stage_model.state_dict()
    model.load_state_dict({n: x for n, x in own.items() if not n.startswith("decoder.")}, strict=False)
    path = tmp_path_factory.mktemp("decoder") / "decoder.safetensors"
    write_safetensors(path, model.state_dict())
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    paths = {name: tmp_path / f"{name}.png" for name in ("image", "mask", "reference")}
    for name in ("image", "reference"):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(paths[name])
    mask = Image.new("L", (40, 40))
    mask.paste(255, (10, 12, 25, 30))
    mask.save(paths["mask"])
    return paths


def run(model: Path, files: dict[str, Path], outdir: Path, *options: str) -> int:
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return inference.main([*words, "--checkpoint", str(model), "--outdir", str(outdir), *FAST, *options])


def kept_and_hole(editor: Editor, image: Tensor, keep_mask: Tensor) -> Tensor:
    return editor.paint(image, keep_mask, None, [3], sampler="ddim", num_steps=2)


def test_the_editor_tells_it_what_is_kept(tiny_folder: Path, decoder: Path, tmp_path: Path) -> None:
    plain = Editor.from_pretrained(tiny_folder)
    editor = Editor.from_pretrained(tiny_folder, decoder=decoder)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    keep_mask = torch.ones(1, 1, 32, 32)
    keep_mask[..., 8:24, 4:20] = 0
    latents: list[Tensor] = []
    decode = editor.model.first_stage_model.decode
    editor.model.first_stage_model.decode = lambda z, *known: latents.append(z) or decode(z, *known)
    painted = kept_and_hole(editor, image, keep_mask)
    with torch.no_grad():
        expected = decode(latents[0], image, keep_mask).clamp(-1, 1)
        from_latents = plain.model.first_stage_model.decode(latents[0]).clamp(-1, 1)
    assert torch.equal(painted, expected)
    # the encoder is the model's own: the same latents, to which the plain decoder does something else
    torch.testing.assert_close(kept_and_hole(plain, image, keep_mask), from_latents)
    # a config may also name it, and the model's file hold it
    config = load_config(tiny_folder / "config.yaml", overrides=NAMED)
    state = {n: x for n, x in plain.model.state_dict().items() if not n.startswith("first_stage_model.")}
    state |= {f"first_stage_model.{n}": x for n, x in editor.model.first_stage_model.state_dict().items()}
    write_safetensors(tmp_path / "whole.safetensors", state)
    whole = Editor(load_model(config, tmp_path / "whole.safetensors"))
    torch.testing.assert_close(kept_and_hole(whole, image, keep_mask), painted)
    # nothing of what is to be replaced reaches the result
    other = torch.where(keep_mask > 0, image, -image)
    assert torch.equal(kept_and_hole(editor, other, keep_mask), painted)


def test_inference(tiny_folder: Path, decoder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    assert run(tiny_folder, files, tmp_path / "plain") == 0
    assert run(tiny_folder, files, tmp_path / "with", "--decoder", str(decoder)) == 0
    with Image.open(tmp_path / "plain" / "image_0.png") as plain, Image.open(tmp_path / "with" / "image_0.png") as new:
        assert json.loads(new.text["parameters"])["decoder"] == str(decoder)  # pyright: ignore[reportAttributeAccessIssue]
        before, after = np.asarray(plain), np.asarray(new)
    outside = np.asarray(Image.open(files["mask"])) < 128
    assert np.array_equal(before[outside], after[outside])
    assert not np.array_equal(before, after)


def test_another_model_s_decoder(
    tiny_folder: Path, decoder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.safetensors"
    state = read_checkpoint(decoder)
    write_safetensors(foreign, {**state, "encoder.conv_in.weight": state["encoder.conv_in.weight"] + 1})
    for path, named in (
        (foreign, "encoder.conv_in.weight"),
        (tiny_folder / "model.safetensors", "model.safetensors"),
        (tmp_path, tmp_path.name),
        (tmp_path / "none.ckpt", "none.ckpt"),
    ):
        assert run(tiny_folder, files, tmp_path / "out", "--decoder", str(path)) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert named in line


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"])
def test_folders_of_diffusers(name: str, tiny_folder: Path, decoder: Path, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(decoder)
    editor = Editor.from_pretrained(tiny_folder, decoder=tmp_path)
    assert isinstance(editor.model.first_stage_model.decoder, MaskConditionedDecoder)


def test_bulk(tiny_folder: Path, decoder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """A result that the plain decoder made is not taken for one of the other."""
    table = tmp_path / "jobs.jsonl"
    names = {"image": "scene", "mask": "mask", "reference": "reference"}
    table.write_text(json.dumps({names[name]: path.name for name, path in files.items()} | {"name": "a"}) + "\n")
    words = ["--jobs", str(table), "--checkpoint", str(tiny_folder), "--outdir", str(tmp_path / "out"), *FAST]
    pictures = []
    for options in ([], ["--decoder", str(decoder)], ["--decoder", str(decoder)]):
        assert inference.main([*words, *options]) == 0
        with Image.open(tmp_path / "out" / "a.png") as picture:
            pictures.append(np.asarray(picture))
    assert not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[1], pictures[2])


def test_bench(
    tiny_folder: Path, decoder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = tmp_path / "bench"
    for folder, name in (("GT_1", "image"), ("Ref_1", "reference"), ("Mask_bbox_1", "mask")):
        (bench / folder).mkdir(parents=True)
        suffix = {"GT_1": "GT", "Ref_1": "ref", "Mask_bbox_1": "mask"}[folder]
        files[name].rename(bench / folder / f"{1:012d}_{suffix}.png")
    np.save(bench / "id_list.npy", np.array([1]))
    main = importlib.import_module("scripts.inference_test_bench").main
    words = [
        str(bench),
        "--outdir",
        str(tmp_path / "out"),
        "--checkpoint",
        str(tiny_folder),
        *FAST,
        "--sampler",
        "ddim",
    ]
    assert main([*words, "--decoder", str(decoder)]) == 0
    assert len(json.loads((tmp_path / "out" / "settings.json").read_text())["decoder_sha256"]) == 64
    assert main(words) == 2
    assert "other settings (decoder_sha256" in capsys.readouterr().err

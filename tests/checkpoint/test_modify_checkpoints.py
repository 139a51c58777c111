"""scripts/modify_checkpoints.py, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ldm
from ldm.checkpoint.io import read_checkpoint, read_metadata, sha256_file, write_safetensors
from ldm.checkpoint.keys import FILE_TOWER, INPUT_CONV, TEXT_TOWER
from scripts import modify_checkpoints
from scripts.checkpoint_cli import atomic_directory
from scripts.modify_checkpoints import main

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def sd(tmp_path: Path) -> Path:
    """A small file with the layout of Stable Diffusion's, averaged weights included."""
    state = {
        INPUT_CONV: torch.randn(8, 4, 3, 3),
        "first_stage_model.quant_conv.bias": torch.randn(8),
        TEXT_TOWER + "final_layer_norm.weight": torch.randn(8),
        "model_ema.diffusion_modelinput_blocks00weight": torch.randn(8, 4, 3, 3),
    }
    torch.save({"state_dict": state, "epoch": 0, "global_step": 470000}, tmp_path / "sd.ckpt")
    return tmp_path / "sd.ckpt"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes: dict[str, Any] = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    folder = tmp_path_factory.mktemp("clip")
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(folder)
    return folder


def assert_made_from(state: dict[str, Tensor], sd: Path) -> None:
    before = read_checkpoint(sd)
    assert torch.equal(state[INPUT_CONV][:, :4], before[INPUT_CONV])
    assert state[INPUT_CONV].shape == (8, 9, 3, 3)
    assert not state[INPUT_CONV][:, 4:].any()
    assert not any(name.startswith("model_ema.") for name in state)


def test_nine_channels_and_clip(sd: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.safetensors"
    assert main([str(sd), str(out), "--clip", str(clip)]) == 0
    state = read_checkpoint(out)
    assert_made_from(state, sd)
    tower = {name.removeprefix(FILE_TOWER) for name in state if name.startswith(FILE_TOWER)}
    assert {"embeddings.position_ids", "pre_layrnorm.weight", "encoder.layers.0.mlp.fc1.bias"} <= tower
    assert not any(name.startswith(TEXT_TOWER) for name in state)
    provenance = read_metadata(out)
    assert provenance["input_sha256"] == sha256_file(sd)
    assert provenance["command"].startswith("scripts/modify_checkpoints.py ")
    assert provenance["clip"] == str(clip)
    assert provenance["clip_sha256"] == sha256_file(clip / "model.safetensors")
    versions = json.loads(provenance["versions"])
    assert (versions["torch"].partition("+")[0], versions["paint-by-example"]) == (
        torch.__version__.partition("+")[0],
        ldm.__version__,
    )


def test_clip_from_a_file(sd: Path, clip: Path, tmp_path: Path) -> None:
    assert main([str(sd), str(tmp_path / "a.ckpt"), "--clip", str(clip / "model.safetensors")]) == 0
    assert FILE_TOWER + "post_layernorm.weight" in read_checkpoint(tmp_path / "a.ckpt")


def test_ckpt_without_clip(sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sd), str(tmp_path / "out.ckpt")]) == 0
    assert "image tower" in capsys.readouterr().out
    content = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert content["provenance"]["input_sha256"] == sha256_file(sd)
    assert_made_from(content["state_dict"], sd)
    assert TEXT_TOWER + "final_layer_norm.weight" in content["state_dict"]


def test_averaged_weights(sd: Path, tmp_path: Path) -> None:
    assert main([str(sd), str(tmp_path / "out.ckpt"), "--use-ema"]) == 0
    averaged = read_checkpoint(sd)["model_ema.diffusion_modelinput_blocks00weight"]
    assert torch.equal(read_checkpoint(tmp_path / "out.ckpt")[INPUT_CONV][:, :4], averaged)


def test_defaults_are_the_originals(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pretrained_models").mkdir()
    sd.rename(tmp_path / "pretrained_models" / "sd-v1-4.ckpt")
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert_made_from(
        read_checkpoint("pretrained_models/sd-v1-4-modified-9channel.ckpt"), Path("pretrained_models/sd-v1-4.ckpt")
    )


def test_never_overwrites_unasked(sd: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (sd, clip / "model.safetensors"):
        before = path.read_bytes()
        assert main([str(sd), str(path), "--clip", str(clip), "--overwrite"]) == 2
        assert "replace" in capsys.readouterr().err
        assert path.read_bytes() == before
    (tmp_path / "out.ckpt").write_text("precious")
    assert main([str(sd), str(tmp_path / "out.ckpt")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.ckpt").read_text() == "precious"
    assert main([str(sd), str(tmp_path / "out.ckpt"), "--overwrite"]) == 0


def test_errors(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.ckpt"
    write_safetensors(tmp_path / "nine.safetensors", {INPUT_CONV: torch.zeros(8, 9, 3, 3)})
    (tmp_path / "folder").mkdir()

    def no_network(*_: object) -> str:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    monkeypatch.setattr("transformers.utils.hub.cached_file", no_network)
    for arguments, message in (
        ([tmp_path / "none.ckpt", out], "none.ckpt: no such file"),
        ([sd, tmp_path / "out.bin"], "expected .safetensors or .ckpt"),
        ([tmp_path / "nine.safetensors", out], f"{tmp_path / 'nine.safetensors'}: {INPUT_CONV}: got 9 input channels"),
        ([tmp_path / "nine.safetensors", out], "inflated already"),
        ([sd, out, "--in-channels", "4"], f"{INPUT_CONV}: has 4 input channels, and 4 are asked for"),
        ([sd, out, "--in-channels", "-3"], "and -3 are asked for; ask for more"),
        ([sd, out, "--clip", tmp_path / "none.safetensors"], "none.safetensors: no such file"),
        ([sd, out, "--clip", tmp_path / "folder"], "folder without model.safetensors"),
        ([sd, out, "--clip", sd], "no complete CLIP image tower"),
        ([sd, out, "--clip", "openai/clip-vit-large-patch14"], "download it elsewhere and pass its folder"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert not out.exists()


def test_an_interruption_leaves_nothing(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    assert main([str(sd), str(tmp_path / "out.safetensors")]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == [sd]


def test_init_and_dry_run(sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init = torch.randn(8, 12, 3, 3)
    write_safetensors(tmp_path / "init.safetensors", {"conv_in.weight": init})
    out = tmp_path / "out.safetensors"
    arguments = [str(sd), str(out), "--in-channels", "12", "--init", str(tmp_path / "init.safetensors")]
    assert main([*arguments, "--dry-run"]) == 0
    assert "4 -> 12 input channels" in capsys.readouterr().out
    assert not out.exists()
    assert main(arguments) == 0
    weight = read_checkpoint(out)[INPUT_CONV]
    assert torch.equal(weight[:, :4], read_checkpoint(sd)[INPUT_CONV])
    assert torch.equal(weight[:, 4:], init[:, 4:])
    assert read_metadata(out)["init_sha256"] == sha256_file(tmp_path / "init.safetensors")


@pytest.fixture(params=["whole", "unet"])
def diffusers_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A pipeline's folder, or its UNet's by itself, in half precision and as a pickle."""
    folder = tmp_path / "pipeline"
    unet = folder / "unet"
    unet.mkdir(parents=True)
    state = {"conv_in.weight": torch.randn(8, 4, 3, 3).half(), "conv_out.weight": torch.randn(4, 8, 3, 3).half()}
    torch.save(state, unet / "diffusion_pytorch_model.bin")
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", "in_channels": 4}))
    index = {"_class_name": "StableDiffusionPipeline", "unet": [], "vae": []}
    (folder / "model_index.json").write_text(json.dumps(index))
    write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", {"w": torch.ones(2)})
    return folder if request.param == "whole" else unet


def test_diffusers_folders(diffusers_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in diffusers_folder.rglob("*") if path.is_file()}
    assert main([str(diffusers_folder), str(out), "--in-channels", "8"]) == 0
    unet = out / "unet" if (diffusers_folder / "unet").exists() else out
    assert json.loads((unet / "config.json").read_text()) == {"_class_name": "UNet2DConditionModel", "in_channels": 8}
    weight = read_checkpoint(unet / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert weight.shape == (8, 8, 3, 3)
    assert weight.dtype == torch.float16
    assert not (unet / "diffusion_pytorch_model.bin").exists()
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").exists() == (unet != out)
    assert {path: path.read_bytes() for path in diffusers_folder.rglob("*") if path.is_file()} == before
    for arguments, message in (
        ([out, tmp_path / "again", "--in-channels", "9"], "inflated already"),
        ([diffusers_folder, out], "exists already"),
        ([diffusers_folder, diffusers_folder / "inside"], "lies in the other"),
        ([diffusers_folder, tmp_path / "x", "--clip", "clip"], "has no place for --clip"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert message in capsys.readouterr().err
    assert main([str(diffusers_folder), str(out), "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pipeline"]


def test_runs_from_a_checkout(sd: Path, tmp_path: Path) -> None:
    command = [sys.executable, modify_checkpoints.__file__, str(sd), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 -> 9 input channels" in done.stdout


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with atomic_directory(folder) as partial:
        (partial / "a").touch()
    with pytest.raises(ZeroDivisionError), atomic_directory(folder) as partial:
        (partial / "b").touch()
        raise ZeroDivisionError
    assert [path.name for path in folder.iterdir()] == ["a"]
    with atomic_directory(folder) as partial:
        (partial / "c").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "c"]
    with atomic_directory(tmp_path / ("d" * 255)) as partial:  # as long as the file system allows
        (partial / "a").touch()
    assert len(list(tmp_path.rglob("*"))) == 4

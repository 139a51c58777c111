"""What a file is, told from its names, shapes and one small tensor; broken files end in a line."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint.io import sha256_file, write_safetensors
from ldm.checkpoint.keys import FILE_TOWER, INPUT_CONV, TEXT_TOWER, UNET, identify
from scripts.inspect_checkpoint import main, parts

ATTENTION = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
State = dict[str, Tensor]


def names(*given: str) -> State:
    return {name: torch.ones(1) for name in given}


def original(channels: int, context: int, *more: str) -> State:
    return {INPUT_CONV: torch.ones(8, channels, 3, 3), UNET + ATTENTION: torch.ones(8, context), **names(*more)}


def unet(channels: int, gain: float = 1.0) -> State:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    return {
        "conv_in.weight": torch.ones(8, channels, 3, 3),
        "conv_norm_out.weight": torch.full((8,), gain),
        attention: torch.ones(8, 768),
        **names("down_blocks.0.resnets.0.conv1.weight"),
    }


TEXT = TEXT_TOWER + "final_layer_norm.weight"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (original(4, 768, TEXT), "Stable Diffusion 1"),
        (original(9, 768, TEXT), "Stable Diffusion 1, inpainting (9 input channels)"),
        (original(5, 1024, TEXT), "Stable Diffusion 2, with depth (5 input channels)"),
        (original(4, 2048, "conditioner.embedders.0.x"), "SDXL"),
        (original(9, 768, FILE_TOWER + "x", "learnable_vector"), "Paint by Example"),
        (
            original(4, 768, "model_ema.diffusion_modelx"),
            "Stable Diffusion 1, training checkpoint with averaged weights (EMA)",
        ),
        (unet(4), "diffusers component: UNet of Stable Diffusion 1"),
        (unet(9), "diffusers component: UNet of Stable Diffusion 1, inpainting (9 input channels)"),
        (unet(8, gain=0.01), "IC-Light offset, fc"),
        (unet(12, gain=-0.01), "IC-Light offset, fbc"),
        (unet(8), "diffusers component: UNet of Stable Diffusion 1, with 8 input channels"),
        (names("control_model.input_blocks.0.0.weight"), "ControlNet, CompVis' names"),
        (original(4, 768, "control_model.input_blocks.0.0.weight"), "ControlNet, CompVis' names, with the model"),
        ({**unet(4), **names("controlnet_cond_embedding.conv_in.weight")}, "ControlNet, diffusers"),
        (names("encoder.down.0.x", "decoder.encoder.layers.0.weight"), "asymmetric VAE"),
        (names("encoder.down_blocks.0.x", "decoder.condition_encoder.layers.0.weight"), "asymmetric VAE"),
        (names("lora_unet_down_blocks_0.lora_down.weight"), "LoRA"),
        (names("unet.down_blocks.0.attn1.to_q.lora_A.weight"), "LoRA"),
        (names("first_stage_model.encoder.conv_in.weight"), "VAE only"),
        (names("encoder.down.0.block.0.norm1.weight", "quant_conv.weight"), "VAE only"),
        (names("encoder.down_blocks.0.resnets.0.norm1.weight"), "diffusers component: VAE"),
        (names("uncond_vector", "mapper.blocks.0.norm1.weight"), "diffusers component: image encoder"),
        (names("text_model.embeddings.x"), "diffusers component: text encoder"),
        (names("embeddings.token_embedding.weight"), "diffusers component: text encoder"),
        (names("vision_model.embeddings.x"), "CLIP's image tower"),
        (names("text_model.embeddings.x", "vision_model.embeddings.x"), "CLIP"),
        (names("down_blocks.0.attn1.processor.to_q_lora.down.weight"), "LoRA"),
        (names("input_hint_block.0.weight", "input_blocks.0.0.weight"), "ControlNet, CompVis' names"),
        (names("up_blocks.1.resnets.0.conv1.weight"), "diffusers component: part of a UNet"),
        (names(UNET + "double_blocks.0.img_attn.qkv.weight"), "Flux"),
        (names("double_blocks.0.img_attn.qkv.weight"), "Flux"),
        (names("single_transformer_blocks.0.attn.to_q.weight"), "Flux"),
        (names(UNET + "joint_blocks.0.x_block.attn.qkv.weight", "first_stage_model.x"), "Stable Diffusion 3"),
        (names("transformer_blocks.0.attn.add_q_proj.weight"), "Stable Diffusion 3"),
        (names(UNET + "blocks.0.attn.weight"), "unknown (another architecture)"),
        (names("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "IP-Adapter"),
        (names("conv_in.weight", "body.0.block1.weight"), "T2I adapter"),
        (names("adapter.conv_in.weight", "adapter.body.0.in_conv.weight"), "T2I adapter"),
        (names("string_to_param.*"), "textual inversion"),
        (names("emb_params"), "textual inversion"),
        (names("<cat>"), "textual inversion"),
        (names("conv_first.weight", "body.0.rdb1.conv1.weight"), "ESRGAN"),
        (names("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"), "ESRGAN"),
        (names("down_blocks.0.motion_modules.0.norm.weight"), "AnimateDiff"),
        (names("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"), "LoRA"),
        (names("visual.transformer.resblocks.0.ln_1.weight", "token_embedding.weight"), "CLIP"),
        (
            names("model_ema.diffusion_modelinput_blocks00weight", "first_stage_model.encoder.conv_in.weight"),
            "averaged",
        ),
        (names("layer.0.weight"), "unknown"),
    ],
)
def test_kinds(state: State, expected: str) -> None:
    assert identify(state).startswith(expected)


def test_published_files(official: State, sd_full_ema: State) -> None:
    assert identify(official) == "Paint by Example"
    assert identify(sd_full_ema) == "Stable Diffusion 1, training checkpoint with averaged weights (EMA)"
    counts = parts(official)
    assert counts["UNet"] == (686, 859_535_364)
    assert counts["mapper and null token"][1] == 62_981_120 + 2_048 + 787_200 + 768
    assert counts["first stage"][0] == 248
    assert counts["noise schedule"] == (12, 12_000)
    bare = names("embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight", "final_layer_norm.weight")
    assert set(parts(bare)) == {"CLIP tower", "norm behind the tower"}
    assert set(parts(sd_full_ema)) == {"UNet", "first stage", "text encoder", "noise schedule", "averaged UNet (EMA)"}


def test_a_file_in_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = original(9, 768, TEXT)
    state["bad"] = torch.tensor([float("nan"), float("inf"), 1.0]).half()
    state["bad8"] = torch.tensor([float("nan"), 1.0]).to(torch.float8_e4m3fn)
    metadata = {"command": "made so", "title": "\x1b[2J\nerror: süß", "tags": "x" * 1000}
    write_safetensors(tmp_path / "m.safetensors", state, metadata)
    assert main([str(tmp_path / "m.safetensors"), "--scan"]) == 0
    output = capsys.readouterr().out
    for line in (
        "UNet: 6,792 numbers in 2 tensors",
        "types: float32 3, float16 1, float8_e4m3fn 1",
        "metadata command: made so\n",
        "metadata title: \\x1b[2J\\nerror: süß\n",
        f"metadata tags: {'x' * 300}… (1,000 characters)\n",
        f"sha256: {sha256_file(tmp_path / 'm.safetensors')}",
        "bad: 1 NaN, 1 Inf of 3",
        "bad8: 1 NaN, 0 Inf of 2",
    ):
        assert line in output
    assert main([str(tmp_path / "m.safetensors"), "--dry-run"]) == 0
    assert "sha256" not in capsys.readouterr().out


class Call:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_broken_files_are_a_line_each_and_the_others_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.safetensors"
    write_safetensors(good, original(4, 768, TEXT))
    content = good.read_bytes()
    torch.save({"w": torch.ones(1000)}, tmp_path / "good.ckpt")
    pickled = (tmp_path / "good.ckpt").read_bytes()
    broken = {
        "truncated.safetensors": (content[:-100], "truncated or damaged"),
        "truncated.ckpt": (pickled[: len(pickled) // 2], "truncated or damaged"),
        "corrupt.safetensors": (content[:8] + b"{" + b"\xff" * 200 + content[300:], "truncated or damaged"),
        "huge_header.safetensors": (b"\xff" * 7 + b"\x7f{" + content[9:], "truncated or damaged"),
        "login.ckpt": (b"<!DOCTYPE html><html>Sign in</html>", "a web page, not weights"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        "empty.ckpt": (b"", "the file is empty"),
        "evil.ckpt": (b"", "refused: the pickle calls"),
    }
    for name, (data, _) in broken.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"w": Call(tmp_path / "trace")}, tmp_path / "evil.ckpt")
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 50_000_000)
    broken["bomb.ckpt"] = (b"", "50,000,000")
    flipped = bytearray(pickled)
    flipped[pickled.index(torch.ones(2).numpy().tobytes())] ^= 1  # a number, no name: only a checksum tells
    (tmp_path / "flipped.ckpt").write_bytes(flipped)
    broken["flipped.ckpt"] = (b"", "its checksums do not fit")
    assert main([str(tmp_path / name) for name in [*broken, "none.ckpt", "good.safetensors"]] + ["--scan"]) == 2
    output, errors = capsys.readouterr()
    assert f"{good}: Stable Diffusion 1" in output
    lines = errors.splitlines()
    assert len(lines) == len(broken) + 1  # one line each
    for line, (name, (_, message)) in zip(lines, broken.items(), strict=False):
        assert line.startswith(f"error: {tmp_path / name}: ")
        assert message in line
    assert "no such file" in lines[-1]
    assert not (tmp_path / "trace").exists()


def test_folders_and_contradictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_safetensors(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", unet(4))
    write_safetensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", names("encoder.down_blocks.0.x"))
    assert main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "component: UNet" in output and "component: VAE" in output
    (tmp_path / "nothing").mkdir()
    assert main([str(tmp_path / "nothing")]) == 2
    assert "got a folder without" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--scan", "--header-only"])

"""Names in files and names in modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.checkpoint.convert import to_diffusers
from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import (
    EMA_COUNTERS,
    INPUT_CONV,
    NEW_PARTS,
    POSITION_IDS,
    SCHEDULE_BUFFERS,
    check_keys,
    identify,
    swap_in_ema,
    to_file_keys,
    to_module_keys,
)
from scripts.modify_checkpoints import add_clip_tower


def layout(state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def test_there_and_back_is_the_published_layout(official: dict[str, Tensor]) -> None:
    modules = to_module_keys(official)
    assert len(official) == 1403
    assert len(modules) == 1402  # all but position_ids
    assert not any("vision_model" in name or "position_ids" in name for name in modules)
    assert layout(to_file_keys(modules)) == layout(official)
    assert set(SCHEDULE_BUFFERS) <= set(modules)


def test_maps_leave_their_own_results_alone(official: dict[str, Tensor]) -> None:
    modules = to_module_keys(official)
    assert layout(to_module_keys(modules)) == layout(modules)
    assert layout(to_file_keys(official)) == layout(official)


def test_position_ids_are_made_anew() -> None:
    state = to_file_keys({"cond_stage_model.transformer.embeddings.position_embedding.weight": torch.randn(17, 8)})
    assert torch.equal(state[POSITION_IDS], torch.arange(17)[None])


@pytest.mark.parametrize("translate", [to_module_keys, to_file_keys])
def test_text_towers_of_2022(
    translate: Callable[[dict[str, Tensor]], dict[str, Tensor]], sd_full_ema: dict[str, Tensor]
) -> None:
    """Their names lack a level, and are then those of an image tower here."""
    older = {name.replace(".text_model.", "."): tensor for name, tensor in sd_full_ema.items()}
    assert older.keys() != sd_full_ema.keys()
    assert translate(older).keys() == translate(sd_full_ema).keys()


def test_averaged_weights_are_dropped_or_take_over(sd_full_ema: dict[str, Tensor]) -> None:
    last = to_module_keys(sd_full_ema)
    averaged = to_module_keys(sd_full_ema, use_ema=True)
    assert len(sd_full_ema) == 1143 + 688
    assert layout(last) == layout(averaged)
    assert len(last) == 1142  # without the numbers of the text tower's positions
    unet = [name for name in last if name.startswith("model.")]
    assert len(unet) == 686
    assert all(averaged[name] is not last[name] for name in unet)
    assert all(averaged[name] is last[name] for name in last if name not in unet)
    dotless = "model_ema.diffusion_modelinput_blocks00weight"
    assert averaged[INPUT_CONV] is sd_full_ema[dotless]


def test_averaged_weights_that_are_not_there() -> None:
    state = {INPUT_CONV: torch.zeros(1), EMA_COUNTERS[0]: torch.tensor(0.9)}
    assert list(to_module_keys(state)) == [INPUT_CONV]
    with pytest.raises(CheckpointError, match="without EMA"):
        to_module_keys(state, use_ema=True)


def test_averaged_weights_alone_become_the_weights(sd_full_ema: dict[str, Tensor]) -> None:
    alone = {name: x for name, x in sd_full_ema.items() if not name.startswith("model.diffusion_model.")}
    expected = to_module_keys(sd_full_ema, use_ema=True)
    got = to_module_keys(alone, expected=expected)
    assert got.keys() == expected.keys()
    assert all(got[name] is expected[name] for name in expected)
    for refused in (alone, {name: x for name, x in alone.items() if not name.endswith("out2bias")}):
        names = list(expected) if refused is not alone else []
        left = to_module_keys(refused, expected=names)
        assert identify(left).startswith("averaged")
        with pytest.raises(CheckpointError, match=r"this is averaged weights .*model_ema\."):
            check_keys({name: x.shape for name, x in expected.items()}, left)
    with pytest.raises(CheckpointError, match=r"this is averaged weights"):
        swap_in_ema(alone)


def test_what_other_programs_add_is_left_out_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    extras = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0), "denoiser.sigmas": torch.zeros(3)}
    extras["embedding_manager.x"] = torch.zeros(2)
    assert list(to_module_keys({INPUT_CONV: torch.zeros(1), **extras})) == [INPUT_CONV]
    assert all(name in caplog.text for name in extras)


def test_a_checkpoint_that_fits(official: dict[str, Tensor]) -> None:
    modules = to_module_keys(official)
    expected = {name: tensor.shape for name, tensor in modules.items()}
    assert check_keys(expected, modules) == []
    old_parts = {name: tensor for name, tensor in modules.items() if not name.startswith(NEW_PARTS)}
    with pytest.raises(CheckpointError, match="65 missing"):
        check_keys(expected, old_parts)
    assert (
        len(check_keys(expected, old_parts, allow_missing=NEW_PARTS)) == 65
    )  # mapper 60, final_ln 2, proj_out 2, token


def test_every_kind_of_difference_is_listed() -> None:
    expected = {f"a{i}": (2, 3) for i in range(40)}
    got = {name: torch.zeros(2, 3) for name in list(expected)[:25]} | {"a0": torch.zeros(2), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        check_keys(expected, got, source="file.ckpt")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("file.ckpt: ")
    assert "  15 missing:" in lines
    assert "    … and 5 more" in lines
    assert "    extra" in lines
    assert "    a0: got [2], expected [2, 3]" in lines
    assert lines[-1].startswith("do: ")


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (["cond_stage_model.transformer.text_model.final_layer_norm.weight"], "modify_checkpoints.py"),
        (["down_blocks.0.resnets.0.conv1.weight"], "diffusers"),
        (["vision_model.post_layernorm.weight"], "CLIP's image tower; "),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "VAE only"),
        (["first_stage_model.encoder.conv_in.weight"], "VAE only"),
        (["model_ema.diffusion_modelout0weight", "first_stage_model.encoder.conv_in.weight"], r"model_ema\."),
        (["lora_unet_down_blocks_0.lora_up.weight"], "LoRA"),
        (["control_model.input_hint_block.0.weight"], "ControlNet.*--control"),
        (["decoder.encoder.layers.0.weight"], "asymmetric VAE.*--decoder"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "Flux; no model here"),
        (["model.diffusion_model.joint_blocks.0.x.weight"], "Stable Diffusion 3; no model here"),
        (["image_proj.proj.weight"], "IP-Adapter"),
        (["adapter.body.0.in_conv.weight"], "T2I adapter"),
        (["string_to_param.*"], "textual inversion"),
        (["conv_first.weight"], "ESRGAN"),
    ],
)
def test_known_files_are_recognised(official: dict[str, Tensor], names: list[str], remedy: str) -> None:
    expected = {name: tensor.shape for name, tensor in to_module_keys(official).items()}
    with pytest.raises(CheckpointError, match=f"do: .*{remedy}"):
        check_keys(expected, to_module_keys({name: torch.zeros(1) for name in names}))


@pytest.mark.parametrize(("width", "kind"), [(1024, "Stable Diffusion 2"), (2048, "SDXL")])
@pytest.mark.parametrize("channels", [4, 9])
def test_other_families_get_no_advice_that_cannot_work(
    official: dict[str, Tensor], width: int, kind: str, channels: int
) -> None:
    """Their towers and contexts are others, so neither more channels nor a CLIP tower makes them fit."""
    state = {
        INPUT_CONV: torch.zeros(320, channels, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, width),
        "cond_stage_model.model.ln_final.bias" if width == 1024 else "conditioner.embedders.0.x": torch.zeros(1),
    }
    assert identify(state).startswith(kind)
    for reads_text in (False, True):
        expected = {name: x.shape for name, x in to_module_keys(official).items()}
        expected |= {"text_encoder.transformer.final_layer_norm.weight": (768,)} if reads_text else {}
        with pytest.raises(CheckpointError, match=f"this is {kind}") as caught:
            check_keys(expected, to_module_keys(state))
        assert "modify_checkpoints" not in str(caught.value)
    with pytest.raises(CheckpointError, match=f"this is {kind}"):
        to_diffusers(state)
    with pytest.raises(CheckpointError, match=f"this is {kind}"):
        add_clip_tower(state, {name: x for name, x in official.items() if ".vision_model." in name})


def test_four_channels_and_other_sizes_are_recognised(official: dict[str, Tensor]) -> None:
    modules = to_module_keys(official)
    expected = {name: tensor.shape for name, tensor in modules.items()}
    four = modules[INPUT_CONV][:, :4]
    with pytest.raises(CheckpointError, match=r"modify_checkpoints\.py"):
        check_keys(expected, modules | {INPUT_CONV: four})
    smaller = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in modules.items()}
    with pytest.raises(CheckpointError, match="another size"):
        check_keys(expected, smaller)

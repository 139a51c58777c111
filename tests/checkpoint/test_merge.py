"""Merging: the sums, what stays, and the mistakes that are caught by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ldm.checkpoint.convert import to_diffusers
from ldm.checkpoint.io import CheckpointError, read_checkpoint, read_metadata, sha256_file, write_safetensors
from ldm.checkpoint.keys import EMA, FILE_TOWER, INPUT_CONV, NEW_PARTS, POSITION_IDS, UNET, to_module_keys
from ldm.checkpoint.merge import (
    Merge,
    Source,
    add_difference,
    inflate_input_conv,
    merged,
    offset,
    weighted_sum,
)
from scripts.merge_checkpoints import block_norms, main, multipliers_of
from scripts.modify_checkpoints import add_clip_tower

RESNET = UNET + "input_blocks.1.0.in_layers.2.weight"
ATTENTION = UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
DECODER = "first_stage_model.decoder.conv_in.weight"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
State = dict[str, Tensor]


def checkpoint(seed: int, channels: int = 4, context: int = 768, dtype: torch.dtype = torch.float32) -> State:
    """The layout of Stable Diffusion, a few tensors of it."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    return {
        INPUT_CONV: normal(8, channels, 3, 3),
        UNET + "input_blocks.1.1.norm.weight": normal(8),
        RESNET: normal(8, 8, 3, 3),
        ATTENTION: normal(8, context),
        UNET + "out.2.weight": normal(4, 8, 3, 3),
        DECODER: normal(4, 4, 1, 1),
        POSITIONS: torch.arange(7)[None],
        "betas": torch.rand(10, generator=draw),
    }


def source(label: str, state: State) -> Source:
    return Source(label, state)


def written(merge: Merge, m: float = 1.0) -> State:
    return dict(merged(merge, dict.fromkeys(merge.names, m)))


def difference(a: State, b: State, c: State, m: float = 1.0) -> State:
    return written(add_difference(source("A", a), source("B", b), source("C", c)), m)


# --- the sums


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), m=st.floats(-2, 2, width=32), channels=st.sampled_from([4, 8, 9, 12]))
def test_adding_a_difference(seed: int, m: float, channels: int) -> None:
    a, b, c = checkpoint(seed, channels), checkpoint(seed + 1), checkpoint(seed + 2)
    got = difference(a, b, c, m)
    assert got.keys() == a.keys()
    assert torch.equal(got[INPUT_CONV][:, 4:], a[INPUT_CONV][:, 4:])
    for name, tensor in got.items():
        assert tensor.dtype == a[name].dtype
        if not tensor.is_floating_point() or name == "betas":
            assert torch.equal(tensor, a[name])
            continue
        expected = a[name].double()
        first = expected[:, :4] if name == INPUT_CONV else expected
        first += m * (b[name].double() - c[name].double())
        # three roundings of numbers below 32
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), m=st.floats(0.125, 1, width=32))
def test_identities(seed: int, m: float) -> None:
    a, b = checkpoint(seed, 9), checkpoint(seed + 1)
    for name, tensor in difference(a, b, b, m).items():
        assert torch.equal(tensor, a[name])  # nothing was learnt
    none = written(weighted_sum(source("A", a), source("B", b)), 0.0)
    all_of_it = written(weighted_sum(source("A", a), source("B", b)))
    for name in a:
        assert torch.equal(none[name], a[name])
    assert torch.equal(all_of_it[INPUT_CONV][:, 4:], a[INPUT_CONV][:, 4:])
    assert torch.equal(all_of_it[INPUT_CONV][:, :4], b[INPUT_CONV])
    assert torch.equal(all_of_it[RESNET], b[RESNET])
    c = checkpoint(seed + 2)
    there = difference(a, b, c, m)
    back = difference(there, c, b, m)
    for name in a:  # adding C - B takes B - C away
        torch.testing.assert_close(back[name], a[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    a, b, c = (checkpoint(seed, dtype=dtype) for seed in (1, 2, 3))
    got = difference(a, b, c, 0.3)[RESNET]
    assert got.dtype == dtype
    expected = a[RESNET].float() + 0.3 * (b[RESNET].float() - c[RESNET].float())
    torch.testing.assert_close(got, expected.to(dtype), rtol=0, atol=0)


def test_keys_of_a_alone_stay() -> None:
    a, b, c = checkpoint(1, 9), checkpoint(2), checkpoint(3)
    a["cond_stage_model.mapper.resblocks.0.ln_1.weight"] = torch.randn(8)
    b["model_ema.decay"] = torch.ones(())  # pruned files may keep the two counters
    for state in (b, c):
        del state[DECODER], state[POSITIONS]
    got = difference(a, b, c)
    for name in ("cond_stage_model.mapper.resblocks.0.ln_1.weight", DECODER, POSITIONS):
        assert torch.equal(got[name], a[name])


def test_ic_light_is_inflated_and_offset() -> None:
    """The published file is in diffusers' names, the base in those of CompVis."""
    base = checkpoint(1)
    delta = {name: 0.01 * t for name, t in checkpoint(2, 8).items() if name.startswith(UNET)}
    theirs = to_diffusers(delta)["unet"]
    assert "conv_in.weight" in theirs
    with pytest.raises(CheckpointError, match=r"--in-channels 8"):
        offset(source("BASE", base), source("DELTA", theirs))
    inflated = inflate_input_conv(base, 8)
    got = written(offset(source("BASE", inflated), source("DELTA", theirs)))
    for name in delta:
        assert torch.equal(got[name], inflated[name] + delta[name])
    assert torch.equal(got[DECODER], base[DECODER])
    unet = to_diffusers({n: t for n, t in inflated.items() if n.startswith(UNET)})["unet"]
    other = written(offset(source("BASE", unet), source("DELTA", delta)))  # the other way round
    assert all(
        torch.equal(other[name], tensor)
        for name, tensor in to_diffusers({n: t for n, t in got.items() if n.startswith(UNET)})["unet"].items()
    )


def test_multipliers_by_block() -> None:
    merge = weighted_sum(source("A", checkpoint(1)), source("B", checkpoint(2)))
    eleven = UNET + "input_blocks.11.0.in_layers.0.weight"  # does not begin with the block 1
    names = [*merge.names, eleven]
    blocks = {"input_blocks.1": 0.25, "input_blocks": 0.5, "first_stage_model": 0.0}
    multipliers = multipliers_of(names, 1.0, blocks)
    expected = {INPUT_CONV: 0.5, RESNET: 0.25, eleven: 0.5, ATTENTION: 1.0, DECODER: 0.0}
    assert {name: multipliers[name] for name in expected} == expected
    multipliers_of(names, 1.0, {"input_blocks": 1.0, "first_stage_model.decoder": 1.0})
    for block in ("output_block", "betas"):  # no name; a name, but never merged
        with pytest.raises(CheckpointError, match=rf"block {block}: .*input_blocks\.1"):
            multipliers_of(names, 1.0, {block: 0.5})


def test_norms_by_block() -> None:
    a, b, c = checkpoint(1), checkpoint(2), checkpoint(3)
    c[DECODER] = b[DECODER]
    merge = add_difference(source("A", a), source("B", b), source("C", c))
    norms = {block: rest for block, *rest in block_norms(merge, dict.fromkeys(merge.names, 2.0))}
    assert list(norms) == ["first_stage_model.decoder", "input_blocks.0", "input_blocks.1", "middle_block.1", "out.2"]
    assert norms["first_stage_model.decoder"][1] == 0
    names = [name for name in a if "input_blocks.1." in name]
    change = torch.cat([(2 * (b[name] - c[name])).flatten() for name in names]).norm().item()
    before = torch.cat([a[name].flatten() for name in names]).norm().item()
    assert norms["input_blocks.1"] == [2, pytest.approx(change, rel=1e-5), pytest.approx(before, rel=1e-5)]


# --- mistakes


def sdxl(seed: int) -> State:
    return {**checkpoint(seed, context=2048), "conditioner.embedders.0.weight": torch.ones(1)}


def with_ema(state: State) -> State:
    return {**state, "model_ema.diffusion_modelinput_blocks00weight": state[INPUT_CONV]}


def unet_of(state: State) -> State:
    return to_diffusers({name: tensor for name, tensor in state.items() if name.startswith(UNET)})["unet"]


def with_gains(seed: int, gain: float) -> State:
    return {**checkpoint(seed), UNET + "out.0.weight": torch.full((8,), gain)}


@pytest.mark.parametrize(
    ("a", "b", "c", "message"),
    [
        (checkpoint(1), checkpoint(2, 9), checkpoint(3), "input channels A 4, B 9.*swapped, or inflate A"),
        (checkpoint(1, 9), checkpoint(2), checkpoint(3, 9), "C looks like an inpainting model"),
        (checkpoint(1, 9), checkpoint(2, 9), checkpoint(3), "B looks like an inpainting model"),
        (checkpoint(1, 9), checkpoint(2, 5), checkpoint(3), "input channels A 9, B 5, C 4; pass"),
        (
            checkpoint(1, 9),
            {**to_diffusers(checkpoint(2, context=2048))["unet"], "add_embedding.x": torch.ones(1)},
            checkpoint(3),
            "B is SDXL",
        ),
        (checkpoint(1, 9), sdxl(2), sdxl(3), "B is SDXL, A is Stable Diffusion 1"),
        (checkpoint(1, 9), checkpoint(2, context=1024), checkpoint(3), "B is Stable Diffusion 2"),
        (checkpoint(1, 9), with_ema(checkpoint(2)), checkpoint(3), "B: this is .* averaged weights.*UNet with --ema"),
        (with_ema(checkpoint(1, 9)), checkpoint(2), checkpoint(3), "A: this is .* averaged weights.*UNet with --ema"),
        (checkpoint(1, 9), checkpoint(2, 8), checkpoint(3, 8), rf"^{INPUT_CONV}: .*A 9, B 8, C 8; pass"),
        (checkpoint(1, 9), unet_of(checkpoint(2, 12)), checkpoint(3), rf"^{INPUT_CONV}: .*A 9, B 12, C 4;"),
        (checkpoint(1, 9), checkpoint(2), with_gains(3, 0.01), "C is a difference of two networks.*offset BASE"),
        (checkpoint(1, 9), {"lora_unet_x.lora_up.weight": torch.ones(2, 1)}, checkpoint(3), "B is a LoRA"),
        (checkpoint(1, 9), checkpoint(2), {"input_hint_block.0.weight": torch.ones(1)}, "C is a ControlNet"),
        (checkpoint(1, 9), {"image_proj.proj.weight": torch.ones(1)}, checkpoint(3), "B is a IP-Adapter"),
        (checkpoint(1, 9), {"emb_params": torch.ones(1, 768)}, checkpoint(3), "B is a textual inversion"),
        (checkpoint(1, 9), {EMA + "diffusion_modelx": torch.ones(1)}, checkpoint(3), "B: this is averaged weights"),
    ],
)
def test_mistakes_are_caught_by_name(a: State, b: State, c: State, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        add_difference(source("A", a), source("B", b), source("C", c))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("old", ["A", "B", "C", "ABC", "BC"])
def test_text_towers_of_2022_merge(old: str) -> None:
    """Their names lack a level; the result has A's."""
    tower = "cond_stage_model.transformer."
    draws = torch.randn(3, 9, 8)
    names = {label: tower + ("" if label in old else "text_model.") + "embeddings." for label in "ABC"}
    states = {
        label: checkpoint(i, 9 if label == "A" else 4) | {names[label] + "token_embedding.weight": draws[i]}
        for i, label in enumerate("ABC")
    }
    merge = add_difference(*(source(label, state) for label, state in states.items()))
    result = dict(merged(merge, multipliers_of(merge.names, 1.0, {})))
    assert list(result) == list(states["A"])
    torch.testing.assert_close(result[names["A"] + "token_embedding.weight"], draws[0] + draws[1] - draws[2])


@pytest.mark.parametrize("where", ["A", "B", "C"])
def test_what_other_programs_add_keeps_nothing_from_merging(where: str) -> None:
    states = {"A": checkpoint(1, 9), "B": checkpoint(2), "C": checkpoint(3)}
    plain = add_difference(*(source(label, state) for label, state in states.items()))
    states[where] |= {"embedding_manager.x": torch.ones(3), "denoiser.sigmas": torch.ones(5), "v_pred": torch.ones(0)}
    assert add_difference(*(source(label, state) for label, state in states.items())).names == plain.names


def test_files_of_other_kinds_are_named() -> None:
    for other, kind in (
        ({UNET + "double_blocks.0.img_attn.x": torch.ones(1)}, "Flux"),
        ({"conv_first.x": torch.ones(1)}, "ESRGAN"),
    ):
        with pytest.raises(CheckpointError, match=f"B is {kind}"):
            weighted_sum(source("A", checkpoint(1)), source("B", other))


def test_other_names_and_shapes_are_listed() -> None:
    a, b, c = checkpoint(1, 9), checkpoint(2), checkpoint(3)
    b["extra.weight"] = c["extra.weight"] = torch.ones(2)
    del c[RESNET]
    b[ATTENTION + ".more"] = torch.ones(3)
    b[DECODER] = torch.ones(2, 4, 1, 1)
    with pytest.raises(CheckpointError) as caught:
        add_difference(source("A", a), source("B", b), source("C", c))
    lines = str(caught.value).splitlines()
    assert "  2 not in A but in B and C:" in lines or "  2 not in A but in B:" in lines
    assert "    extra.weight" in lines
    assert "  2 not in C but in B:" in lines
    assert f"    {RESNET}" in lines
    assert f"    {DECODER}: [2, 4, 1, 1], [4, 4, 1, 1] in A" in lines
    with pytest.raises(CheckpointError, match="no weight has the same name"):
        weighted_sum(source("A", a), source("B", {}))


@pytest.mark.parametrize(
    ("merge", "a", "b", "message"),
    [
        (weighted_sum, checkpoint(1), checkpoint(2, 9), "input channels A 4, B 9.*swapped, or inflate A"),
        (weighted_sum, checkpoint(1, 9), checkpoint(2, 8), "A 9, B 8"),
        (weighted_sum, checkpoint(1, 12), checkpoint(2, 9), "A 12, B 9"),
        (weighted_sum, with_gains(1, 1.0), with_gains(2, 0.0), "B is a difference of two networks"),
        (offset, checkpoint(1, 12), checkpoint(2, 8), "A 12, B 8"),
        (offset, with_gains(1, 1.0), with_gains(2, 0.8), "B is a whole network"),
        (offset, with_gains(1, 0.0), with_gains(2, 0.0), "A is a difference of two networks"),
    ],
)
def test_mistakes_of_two(merge: Any, a: State, b: State, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        merge(source("A", a), source("B", b))


def test_depth_models_merge_among_themselves() -> None:
    a, b, c = (checkpoint(seed, 5) for seed in (1, 2, 3))
    torch.testing.assert_close(difference(a, b, c)[INPUT_CONV], a[INPUT_CONV] + b[INPUT_CONV] - c[INPUT_CONV])
    first_stage = {DECODER: b[DECODER]}  # has no channels to compare
    assert torch.equal(written(weighted_sum(source("A", a), source("B", first_stage)))[DECODER], b[DECODER])


def test_float8_is_summed_and_checked() -> None:
    a, b, c = checkpoint(1, 9, dtype=torch.float8_e4m3fn), checkpoint(2), checkpoint(3)
    got = difference(a, b, c, 0.5)
    expected = a[RESNET].float() + 0.5 * (b[RESNET] - c[RESNET])
    torch.testing.assert_close(got[RESNET].float(), expected.to(torch.float8_e4m3fn).float())
    assert torch.equal(got[INPUT_CONV][:, 4:].float(), a[INPUT_CONV][:, 4:].float())
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        difference(a, b, c, 1e6)


def test_a_sum_that_does_not_fit_is_an_error() -> None:
    a, b, c = (checkpoint(seed, dtype=torch.float16) for seed in (1, 2, 3))
    with pytest.raises(CheckpointError, match="float16"):
        difference(a, b, c, 1e6)


# --- the command line


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A pickle, and two safetensors files."""
    torch.save({"state_dict": checkpoint(1, 9)}, tmp_path / "a.ckpt")
    for name, seed in (("b", 2), ("c", 3)):
        write_safetensors(tmp_path / f"{name}.safetensors", checkpoint(seed))
    return {name: tmp_path / f"{name}.{'ckpt' if name == 'a' else 'safetensors'}" for name in "abc"}


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def test_all_merges_from_files(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (read_checkpoint(path) for path in files.values())
    out = tmp_path / "new" / "out.safetensors"
    assert run("add-difference", *files.values(), out, "--multiplier", 0.5, "--block", "first_stage_model=0") == 0
    assert "A " in (output := capsys.readouterr().out)
    assert "inpainting (9 input channels)" in output
    got = read_checkpoint(out)
    assert torch.equal(got[DECODER], a[DECODER])
    torch.testing.assert_close(got[RESNET], a[RESNET] + 0.5 * (b[RESNET] - c[RESNET]))
    record = read_metadata(out)
    for role, path in zip("ABC", files.values(), strict=True):
        assert record[role] == path.name
        assert record[f"{role}_sha256"] == sha256_file(path)
    assert record["command"].startswith("scripts/merge_checkpoints.py add-difference ")
    assert "torch" in record["versions"]
    assert run("weighted-sum", files["a"], files["b"], out, "--overwrite", "--only", "unet") == 0
    got = read_checkpoint(out)
    torch.testing.assert_close(got[RESNET], (a[RESNET] + b[RESNET]) / 2)
    assert torch.equal(got[DECODER], a[DECODER])
    assert run("offset", files["a"], files["b"], out, "--overwrite") == 0
    assert torch.equal(read_checkpoint(out)[RESNET], a[RESNET] + b[RESNET])


def test_dry_run_shows_norms_and_writes_nothing(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert run("add-difference", *files.values(), tmp_path / "out.safetensors", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "input_blocks.1 " in output and "first_stage_model.decoder " in output
    assert "not written" in output
    assert sorted(tmp_path.iterdir()) == before


def test_averaged_weights_are_chosen(files: dict[str, Path], tmp_path: Path) -> None:
    state = checkpoint(5)
    averaged = {
        f"model_ema.{n.removeprefix('model.').replace('.', '')}": t + 1 for n, t in state.items() if n.startswith(UNET)
    }
    write_safetensors(tmp_path / "ema.safetensors", {**state, **averaged})
    arguments = ("offset", files["a"], tmp_path / "ema.safetensors", tmp_path / "out.safetensors", "--overwrite")
    assert run(*arguments) == 2
    a = read_checkpoint(files["a"])
    for choice, added in (("last", state[RESNET]), ("averaged", state[RESNET] + 1)):
        assert run(*arguments, "--ema", choice) == 0
        assert torch.equal(read_checkpoint(tmp_path / "out.safetensors")[RESNET], a[RESNET] + added)


def test_wrong_command_lines(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = files.values()
    unet = tmp_path / "unet.safetensors"
    write_safetensors(unet, unet_of(checkpoint(4)))
    contents = {path: path.read_bytes() for path in (*files.values(), unet)}
    for arguments, message in (
        (("add-difference", b, a, c, tmp_path / "o.safetensors"), "exchange them if swapped"),
        (("add-difference", a, b, c, tmp_path / "o.ckpt"), "expected .safetensors"),
        (("add-difference", a, b, c, b, "--overwrite"), "would replace the input"),
        (("add-difference", a, b, tmp_path / "none.ckpt", tmp_path / "o.safetensors"), "no such file"),
        (("weighted-sum", a, tmp_path, tmp_path / "x" / "o.safetensors"), "lies in the other"),
        (("weighted-sum", a, b, tmp_path / "o.safetensors", "--block", "nonsense=1"), "no merged tensor's name begins"),
        (
            ("weighted-sum", a, unet, tmp_path / "o.safetensors", "--only", "first-stage"),
            "holds nothing of first-stage",
        ),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == contents
    for options, message in (
        (("--block", "input_blocks"), "expected BLOCK=NUMBER"),
        (("--block", "input_blocks=nan"), "got 'nan', expected a finite number"),
        (("--multiplier", "inf"), "got 'inf', expected a finite number"),
        (("--multiplier", "half"), "got 'half', expected a finite number"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run("weighted-sum", a, b, tmp_path / "o.safetensors", *options)
        assert message in capsys.readouterr().err


def test_a_unet_alone_is_only_a_unet(files: dict[str, Path], tmp_path: Path) -> None:
    """`--only unet` takes all of it, on either side."""
    unet, out = tmp_path / "unet.safetensors", tmp_path / "out.safetensors"
    write_safetensors(unet, unet_of(checkpoint(4)))
    for a, b, name in ((files["a"], unet, RESNET), (unet, files["b"], "down_blocks.0.resnets.0.conv1.weight")):
        assert run("weighted-sum", a, b, out, "--only", "unet", "--multiplier", 1, "--overwrite") == 0
        expected = checkpoint(4 if b == unet else 2)[RESNET]
        assert torch.equal(read_checkpoint(out)[name], expected)


def test_an_interrupted_merge_leaves_nothing(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    assert run("weighted-sum", files["a"], files["b"], tmp_path / "out.safetensors") == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


# --- starting points for training


@settings(max_examples=20, deadline=None)
@given(new=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_inflated_conv_ignores_the_new_channels(new: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 4, 3, 3, generator=generator)
    state = {INPUT_CONV: weight, "other": torch.ones(1)}
    inflated = inflate_input_conv(state, in_channels=4 + new)
    assert state[INPUT_CONV] is weight
    assert inflated["other"] is state["other"]
    x = torch.randn(2, 4, 6, 5, generator=generator)
    anything = 1e3 * torch.randn(2, new, 6, 5, generator=generator)
    got = F.conv2d(torch.cat([x, anything], dim=1), inflated[INPUT_CONV], padding=1)
    # Sums of the same 36 products, perhaps in another order: a few ulp of float32 at values up to 20.
    torch.testing.assert_close(got, F.conv2d(x, weight, padding=1), rtol=0, atol=1e-5)


def test_inflation_keeps_dtype() -> None:
    inflated = inflate_input_conv({INPUT_CONV: torch.ones(2, 4, 3, 3).half()})
    assert inflated[INPUT_CONV].dtype == torch.float16
    assert inflated[INPUT_CONV].shape == (2, 9, 3, 3)


def test_inflation_refuses() -> None:
    inflated = inflate_input_conv({INPUT_CONV: torch.ones(2, 4, 3, 3)})
    with pytest.raises(CheckpointError, match="inflated already"):
        inflate_input_conv(inflated)
    with pytest.raises(CheckpointError, match="no convolution"):
        inflate_input_conv({"encoder.conv_in.weight": torch.ones(2, 4, 3, 3)})
    wide = {INPUT_CONV: torch.ones(2, 9, 3, 3), "model.diffusion_model.out.2.weight": torch.ones(4, 2, 3, 3)}
    with pytest.raises(CheckpointError, match=r"got 9 .*4"):
        inflate_input_conv(wide, 12)  # wider still, but not from four
    for name in ("control_model.input_blocks.0.0.weight", "controlnet_cond_embedding.conv_in.weight"):
        with pytest.raises(CheckpointError, match="ControlNet"):
            inflate_input_conv({"conv_in.weight": torch.ones(2, 4, 3, 3), name: torch.ones(1)})


@pytest.mark.parametrize("key", [INPUT_CONV, "conv_in.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_channels", [8, 9, 12])
def test_new_channels_are_those_given(key: str, dtype: torch.dtype, in_channels: int) -> None:
    state = {key: torch.randn(2, 4, 3, 3).to(dtype)}
    init = {INPUT_CONV: torch.randn(2, in_channels, 3, 3)}
    inflated = inflate_input_conv(state, in_channels, init)[key]
    assert inflated.dtype == dtype
    assert torch.equal(inflated[:, :4], state[key])
    assert torch.equal(inflated[:, 4:], init[INPUT_CONV][:, 4:].to(dtype))
    with pytest.raises(CheckpointError, match=rf"expected \[2, {in_channels}, 3, 3\]"):
        inflate_input_conv(state, in_channels, {INPUT_CONV: torch.randn(2, 5, 3, 3)})


@pytest.mark.parametrize("level", ["", "vision_model."])
def test_stable_diffusion_and_clip_make_the_published_layout(
    official: dict[str, Tensor], sd_full_ema: dict[str, Tensor], level: str
) -> None:
    sd = {name: tensor for name, tensor in sd_full_ema.items() if not name.startswith(EMA)}
    clip = {level + n.removeprefix(FILE_TOWER): t for n, t in official.items() if n.startswith(FILE_TOWER)}
    made = add_clip_tower(inflate_input_conv(sd), clip)
    expected = {name: tensor for name, tensor in official.items() if not name.startswith(NEW_PARTS)}
    assert {name: (t.shape, t.dtype) for name, t in made.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }


@pytest.fixture(scope="module")
def transformers_clip() -> dict[str, dict[str, Tensor]]:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    sizes: dict[str, Any] = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    both = CLIPConfig(vision_config=vision.to_dict(), text_config={**sizes, "vocab_size": 99})
    return {"CLIPVisionModel": CLIPVisionModel(vision).state_dict(), "CLIPModel": CLIPModel(both).state_dict()}


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPModel"])
def test_towers_of_transformers(transformers_clip: dict[str, dict[str, Tensor]], kind: str) -> None:
    tower = to_module_keys(add_clip_tower({"betas": torch.ones(2)}, transformers_clip[kind]))
    assert tower.pop("betas").shape == (2,)
    names = {"cond_stage_model.transformer." + name for name in transformers_clip["CLIPVisionModel"]}
    assert set(tower) == names


def test_a_new_tower_replaces_the_old_and_the_text_tower(transformers_clip: dict[str, dict[str, Tensor]]) -> None:
    old = {
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(2),
        FILE_TOWER + "encoder.layers.7.layer_norm1.weight": torch.ones(2),
        "cond_stage_model.mapper.resblocks.0.ln_1.weight": torch.ones(2),
    }
    made = add_clip_tower(old, transformers_clip["CLIPVisionModel"])
    assert [name for name in old if name in made] == ["cond_stage_model.mapper.resblocks.0.ln_1.weight"]
    assert torch.equal(made[POSITION_IDS], torch.arange(5)[None])


def test_wrong_towers(transformers_clip: dict[str, dict[str, Tensor]]) -> None:
    clip = transformers_clip["CLIPVisionModel"]
    full_size = {INPUT_CONV: torch.empty(320, 9, 3, 3, device="meta")}
    with pytest.raises(CheckpointError, match=r"\(5, 8, 2\).*ViT-L/14"):
        add_clip_tower(full_size, clip)
    with pytest.raises(CheckpointError, match="image tower"):
        add_clip_tower({}, {name: t for name, t in clip.items() if "layers.0.mlp" not in name})
    text = {n: t for n, t in transformers_clip["CLIPModel"].items() if not n.startswith("vision_model.")}
    with pytest.raises(CheckpointError, match="image tower"):
        add_clip_tower({}, text)

"""Between the published layout and a diffusers folder: the same tensors, the same pictures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoint.convert import (
    diffusers_configs,
    model_config,
    schedule_config,
    to_diffusers,
    to_original,
    weight_files,
)
from ldm.checkpoint.io import CheckpointError, read_checkpoint, read_metadata, sha256_file, write_safetensors
from ldm.checkpoint.keys import INPUT_CONV, NEW_PARTS, to_file_keys
from ldm.config import (
    AutoencoderConfig,
    Config,
    ExemplarEncoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    dump_config,
    load_config,
)
from ldm.editing.editor import Editor
from ldm.files import UserError
from ldm.latent_diffusion import load_model
from scripts.convert_checkpoint import main, read_folder

# Uneven on purpose: levels with and without attention, several blocks, as many layers as diffusers' one mapper needs.
SMALL = ModelConfig(
    image_size=32,
    unet=UNetConfig(
        model_channels=32,
        channel_mult=[1, 2, 2],
        num_res_blocks=2,
        attention_resolutions=[2],
        num_heads=4,
        context_dim=16,
    ),
    first_stage=AutoencoderConfig(ch=32, ch_mult=[1, 2], num_res_blocks=1),
    exemplar_encoder=ExemplarEncoderConfig(
        image_size=28, patch_size=14, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=4, mapper_layers=1
    ),
    text_encoder=TextEncoderConfig(hidden_size=64, intermediate_size=96, num_layers=2, num_heads=1, vocab_size=99),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, none of them zero, with its config beside."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.yaml").write_text(dump_config(Config(model=SMALL)))
    torch.manual_seed(0)
    state = to_file_keys(load_model(Config(model=SMALL)).state_dict())
    for name, tensor in state.items():
        if tensor.is_floating_point() and "." in name:
            tensor.add_(0.02 * torch.randn_like(tensor))
    write_safetensors(folder / "model.safetensors", state)
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def converted(small: Path) -> Path:
    folder = small.parent / "diffusers"
    assert main([str(small), str(folder), "--to", "diffusers"]) == 0
    return folder


@pytest.fixture(scope="module")
def sd(small: Path) -> Path:
    """The same first stage and UNet as Stable Diffusion has them: four channels, a text tower."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)
    tower = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=99, bos_token_id=0, eos_token_id=2)).state_dict()
    text = {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in tower.items()}
    text["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    shared = {
        n: t
        for n, t in read_checkpoint(small).items()
        if n.startswith(("model.", "first_stage_model.")) or "." not in n
    }
    del shared["learnable_vector"]
    state = {**shared, **text, INPUT_CONV: torch.randn(32, 4, 3, 3), "model_ema.decay": torch.ones(())}
    write_safetensors(small.parent / "sd.safetensors", state)
    return small.parent / "sd.safetensors"


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


@pytest.mark.parametrize("published", ["official", "sd_full_ema"])
def test_full_size_has_exactly_the_names_of_diffusers(published: str, request: pytest.FixtureRequest) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig

    state: dict[str, Tensor] = request.getfixturevalue(published)
    components = to_diffusers(state)
    configs = diffusers_configs(components, ModelConfig())
    build: dict[str, Callable[[dict[str, Any]], Any]] = {
        "unet": UNet2DConditionModel.from_config,
        "vae": AutoencoderKL.from_config,
        "image_encoder": lambda config: PaintByExampleImageEncoder(CLIPVisionConfig(**config)),
        "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    }
    for name, part in components.items():
        with torch.device("meta"):
            expected = build[name](configs[f"{name}/config.json"]).state_dict()
        # the level that files have and transformers 5 takes away in loading
        got = {re.sub(r"(vision|text)_model\.", "", key): tensor for key, tensor in part.items()}
        assert shapes(got) == shapes(expected)
    assert len(components) == 3
    back = to_original(components, ScheduleConfig())
    assert shapes(back) == shapes({name: t for name, t in state.items() if not name.startswith("model_ema.")})


def test_round_trip_is_the_identity(small: Path, converted: Path, tmp_path: Path) -> None:
    assert main([str(converted), str(tmp_path / "back.safetensors"), "--to", "original"]) == 0
    before, after = read_checkpoint(small), read_checkpoint(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert load_config(tmp_path / "config.yaml").model == replace(SMALL, text_encoder=TextEncoderConfig())
    assert read_metadata(converted / "unet" / "diffusion_pytorch_model.safetensors")["input_sha256"] == sha256_file(
        small
    )
    record = read_metadata(tmp_path / "back.safetensors")
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert record[f"input_sha256 {unet}"] == sha256_file(converted / unet)


@pytest.mark.parametrize("attended", [[], [1], [1, 2], [4], [1, 2, 4]])
@pytest.mark.parametrize(("levels", "blocks"), [(1, 1), (2, 3), (3, 1)])
def test_the_table_is_two_way_for_any_size(attended: list[int], levels: int, blocks: int) -> None:
    config = UNetConfig(
        model_channels=32,
        channel_mult=[1] * levels,
        num_res_blocks=blocks,
        attention_resolutions=attended,
        context_dim=8,
    )
    from ldm.models.unet import UNetModel

    with torch.device("meta"):
        unet = UNetModel(config).state_dict()
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    components = to_diffusers(state)
    assert shapes(to_original(components)) == shapes(state)
    assert len(components["unet"]) == len(state)


def test_the_same_picture(small: Path, converted: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, PaintByExamplePipeline, UNet2DConditionModel
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
    from transformers import CLIPImageProcessor

    # From its parts: diffusers 0.42 does not find the library that every such folder's model_index.json names.
    parts: dict[str, Any] = {}
    for name, kind in (
        ("unet", UNet2DConditionModel),
        ("vae", AutoencoderKL),
        ("image_encoder", PaintByExampleImageEncoder),
    ):
        parts[name], loading = kind.from_pretrained(converted / name, output_loading_info=True)
        assert not any(loading.values()), loading  # strictly: nothing missing, unexpected or of another shape
    pipeline: Any = PaintByExamplePipeline(
        **parts,
        scheduler=DDIMScheduler.from_pretrained(converted / "scheduler"),
        feature_extractor=CLIPImageProcessor.from_pretrained(converted / "feature_extractor"),
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    model = load_model(small.parent / "config.yaml", small)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    hole = torch.zeros(1, 1, 32, 32)
    hole[..., 8:24, 10:22] = 1  # on the latent grid, where nearest (theirs) and bilinear (ours) agree
    exemplar, x_T = torch.randn(1, 3, 28, 28), torch.randn(1, 4, 16, 16)
    theirs = pipeline(
        image=image,
        mask_image=hole,
        example_image=exemplar,
        latents=x_T.clone(),
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    z_masked = model.encode_image(image * (1 - hole), torch.Generator().manual_seed(5))
    c_concat, context = model.c_concat(z_masked, 1 - hole), model.encode_exemplar(exemplar)
    z = model.sample(c_concat, context, sampler="ddim", num_steps=10, guidance_scale=3.0, x_T=x_T)
    ours = (model.decode_latents(z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert ours.std() > 0.05  # a picture, not a plane
    # Two float32 implementations, 10 steps with guidance: 5e-7 apart here; other processors sum in other orders.
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=2e-5)


def test_stable_diffusion_becomes_its_pipelines(sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline

    state = read_checkpoint(sd)
    nine = {**state, INPUT_CONV: torch.randn(32, 9, 3, 3)}
    write_safetensors(tmp_path / "nine.safetensors", nine)
    (tmp_path / "config.yaml").write_text(dump_config(Config(model=SMALL)))
    for path, kind in ((sd, StableDiffusionPipeline), (tmp_path / "nine.safetensors", StableDiffusionInpaintPipeline)):
        folder = tmp_path / kind.__name__
        assert main([str(path), str(folder), "--to", "diffusers", "--config", str(tmp_path / "config.yaml")]) == 0
        assert kind.__name__ in (output := capsys.readouterr().out)
        assert "no --tokenizer" in output
        loaded = kind.from_pretrained(folder, tokenizer=None)
        assert torch.equal(loaded.unet.conv_in.weight, read_checkpoint(path)[INPUT_CONV])
        text = state["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
        assert torch.equal(loaded.text_encoder.get_input_embeddings().weight, text)
        back = tmp_path / f"back from {kind.__name__}" / "model.ckpt"
        assert main([str(folder), str(back), "--to", "original"]) == 0
        returned, given = read_checkpoint(back), read_checkpoint(path)
        assert returned.keys() == {name for name in given if not name.startswith("model_ema.")}
        assert all(torch.equal(tensor, given[name]) for name, tensor in returned.items())


def test_a_tokenizer_is_copied(sd: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "vocab.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(dump_config(Config(model=SMALL)))
    arguments = [str(sd), str(tmp_path / "out"), "--to", "diffusers", "--config", str(tmp_path / "config.yaml")]
    assert main([*arguments, "--tokenizer", str(tmp_path / "tokens")]) == 0
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["tokenizer"] == [
        "transformers",
        "CLIPTokenizer",
    ]


def test_names_of_other_years(converted: Path, tmp_path: Path) -> None:
    """Folders of 2022 call the first stage's attention otherwise; transformers 5 saves towers without their level."""
    components, configs = read_folder(converted)
    older = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def rename(kind: str, name: str) -> str:
        if kind == "vae" and "attentions" in name:
            return re.sub("|".join(map(re.escape, older)), lambda found: older[found[0]], name)
        return name.replace("model.vision_model.", "model.") if kind == "image_encoder" else name

    renamed = {kind: {rename(kind, n): t for n, t in part.items()} for kind, part in components.items()}
    assert renamed["vae"].keys() != components["vae"].keys()
    assert renamed["image_encoder"].keys() != components["image_encoder"].keys()
    schedule = schedule_config(configs["scheduler"])
    got, expected = to_original(renamed, schedule), to_original(components, schedule)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_pickles_shards_and_half_precision(converted: Path, tmp_path: Path) -> None:
    components, _ = read_folder(converted)
    unet = {name: tensor.half() for name, tensor in components["unet"].items()}
    for name in ("vae", "image_encoder"):
        (tmp_path / name).mkdir()
        torch.save(
            dict(components[name]), tmp_path / name / ("pytorch_model.bin" if name != "vae" else "model.fp16.bin")
        )
    (tmp_path / "unet").mkdir()
    names = list(unet)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: unet[name] for name in part}, tmp_path / "unet" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    read, _ = read_folder(tmp_path)
    assert shapes(read["unet"]) == shapes(unet)
    assert read["vae"].keys() == components["vae"].keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["first_stage.norm_groups=0"], "without norms"),
        (["exemplar_encoder.tokens=all"], "tokens all"),
        (["exemplar_encoder.mapper_layers=5"], "mapper_layers 5"),
        (["schedule.name=cosine"], "cosine"),
        (["schedule.name=linear"], r"noise schedule \(\w+\) is not the config's"),
        (["condition=both"], "condition both"),
        (["condition=text"], "x_t, z_masked, keep_mask .*text feeds x_t, hole_mask, z_masked"),
        (["input_channels=[x_t,hole_mask,z_masked]"], "x_t, hole_mask, z_masked .* feeds x_t, z_masked, keep_mask"),
        (["first_stage.decoder=asymmetric"], "decoder asymmetric"),
        (["unet.model_channels=320"], r"\[32, 64, 64\], expected \[320, 640, 640\]"),
    ],
)
def test_what_diffusers_lacks_is_named(
    overrides: list[str], message: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(small.parent / "config.yaml", overrides=[f"model.{override}" for override in overrides])
    (tmp_path / "other.yaml").write_text(dump_config(config))
    arguments = [str(small), str(tmp_path / "out"), "--to", "diffusers", "--config", str(tmp_path / "other.yaml")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "condition both"),
        ("first_stage_model.decoder.encoder.layers.0.weight", "decoder asymmetric"),
    ],
)
def test_parts_that_the_config_does_not_tell(
    name: str, message: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_safetensors(tmp_path / "more.safetensors", {**read_checkpoint(small), name: torch.ones(1)})
    (tmp_path / "config.yaml").write_text(dump_config(Config(model=SMALL)))
    assert main([str(tmp_path / "more.safetensors"), str(tmp_path / "out"), "--to", "diffusers"]) == 2
    assert message in capsys.readouterr().err


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def text_pipeline(text_folder: Path, tmp_path: Path) -> Path:
    """A model for text, converted, with its tokenizer."""
    words = [str(text_folder / "model.safetensors"), str(tmp_path / "pipeline"), "--to", "diffusers"]
    assert main([*words, "--tokenizer", str(text_folder / "tokenizer")]) == 0
    return tmp_path / "pipeline"


def test_a_text_model_comes_back_ready_to_use(
    text_folder: Path, text_config: Config, text_pipeline: Path, tmp_path: Path
) -> None:
    out = tmp_path / "back" / "model.safetensors"
    assert main([str(text_pipeline), str(out), "--to", "original"]) == 0
    assert load_config(out.parent / "config.yaml").model == text_config.model
    scene, hole = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 255)
    pictures = [
        Editor.from_pretrained(path).edit(scene, hole, prompt="a dog", num_steps=2) for path in (text_folder, out)
    ]
    assert np.array_equal(*map(np.asarray, pictures))
    edit_json(text_pipeline / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert main([str(text_pipeline), str(out), "--to", "original", "--overwrite"]) == 0
    assert load_config(out.parent / "config.yaml").model.parameterization == "v"


@pytest.mark.parametrize(("pipeline", "known"), [("StableDiffusionPipeline", True), ("OtherPipeline", False)])
def test_eight_channels_are_of_relighting_unless_told_otherwise(
    pipeline: str, known: bool, text_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = text_pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    write_safetensors(weights, {**load_file(weights), "conv_in.weight": torch.ones(32, 8, 3, 3)})
    edit_json(text_pipeline / "unet" / "config.json", in_channels=8)
    edit_json(text_pipeline / "model_index.json", _class_name=pipeline)
    out = tmp_path / "back" / "model.safetensors"
    assert main([str(text_pipeline), str(out), "--to", "original"]) == 0
    assert (out.parent / "config.yaml").exists() == known != ("no config.yaml" in capsys.readouterr().out)
    if known:
        model = load_config(out.parent / "config.yaml")
        assert load_model(model, out).config.input_channels == ["x_t", "z_foreground"]


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("unet/config", {"use_linear_projection": True}, "use_linear_projection True"),
        ("unet/config", {"attention_head_dim": [5, 10]}, r"attention_head_dim \[5, 10\]"),
        ("text_encoder/config", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("vae/config", {"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL"),
        ("scheduler/scheduler_config", {"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ("unet", {}, "linear projections"),
    ],
)
def test_folders_of_other_families(
    part: str,
    fields: dict[str, Any],
    message: str,
    text_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if fields:
        edit_json(text_pipeline / f"{part}.json", **fields)
    else:
        weights = text_pipeline / "unet" / "diffusion_pytorch_model.safetensors"
        state = {n: t.flatten(1) if n.endswith("proj_in.weight") else t for n, t in load_file(weights).items()}
        write_safetensors(weights, state)
    assert main([str(text_pipeline), str(tmp_path / "back.safetensors"), "--to", "original"]) == 2
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model.fp16.safetensors", "model.safetensors", "model.bin"], "model.safetensors"),
        (["model.safetensors.index.fp16.json", "model.safetensors"], "model.safetensors"),
        (["pytorch_model.bin.index.json", "model.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors", "model.bin"], "model.bin"),
        (["model.fp16.bin", "model.fp16.safetensors"], "model.fp16.safetensors"),
        (["model.fp16.bin", "model.safetensors.index.json"], "shard"),
        (["diffusion_pytorch_model.non_ema.safetensors"], "diffusion_pytorch_model.non_ema.safetensors"),
    ],
)
def test_full_precision_goes_first(names: list[str], taken: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps({"weight_map": {"x": "shard"}}))
    assert weight_files(tmp_path) == [tmp_path / taken]


def test_an_index_without_files(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for content in (
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": 3}',
        '{"weight_map": null}',
        "{}",
        "[]",
        "{",
    ):
        index.write_text(content)
        with pytest.raises(UserError, match=re.escape(str(index))):
            weight_files(tmp_path)


@pytest.mark.parametrize(("component", "name"), [("unet", "conv_in.weight"), ("vae", "decoder.conv_out.weight")])
def test_a_folder_whose_shards_lack_a_weight(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], component: str, name: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(converted, folder)
    path = next((folder / component).glob("*.safetensors"))
    state = read_checkpoint(path)
    path.unlink()
    save_file({n: x for n, x in state.items() if n != name}, folder / component / "shard.safetensors")
    index = json.dumps({"weight_map": dict.fromkeys(state, "shard.safetensors")})
    (folder / component / f"{path.stem}.safetensors.index.json").write_text(index, encoding="utf-8-sig")
    assert main([str(folder), str(tmp_path / "out.safetensors"), "--to", "original"]) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_the_bundled_model_runs_here_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrained_models/mini/model.safetensors", str(tmp_path / "out"), "--to", "diffusers"]) == 2
    assert "efficientnet-lite0" in capsys.readouterr().err


def test_what_other_programs_add(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, path = read_checkpoint(small), tmp_path / "a.safetensors"
    config = ["--config", str(small.parent / "config.yaml"), "--to", "diffusers", "--dry-run"]
    write_safetensors(path, state | {"embedding_manager.x": torch.ones(3), "ztsnr": torch.ones(0)})
    assert main([str(path), str(tmp_path / "out"), *config]) == 0
    write_safetensors(path, state | {"v_pred": torch.ones(0)})
    assert main([str(path), str(tmp_path / "out"), *config]) == 2
    assert "model.parameterization: v" in capsys.readouterr().err


def test_incomplete_checkpoints(sd: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(small.parent / "config.yaml")
    state = read_checkpoint(sd)
    write_safetensors(tmp_path / "a.safetensors", {n: t for n, t in state.items() if not n.startswith("first_stage")})
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "a"), "--to", "diffusers", "--config", config]) == 0
    assert "pass vae=" in capsys.readouterr().out
    assert "vae" not in json.loads((tmp_path / "a" / "model_index.json").read_text())
    unet = {n: t for n, t in state.items() if n.startswith("model.")}
    write_safetensors(tmp_path / "a.safetensors", unet)
    arguments = [str(tmp_path / "a.safetensors"), str(tmp_path / "a"), "--to", "diffusers", "--config", config]
    assert main([*arguments, "--overwrite"]) == 0
    assert "pass text_encoder=" in capsys.readouterr().out
    whole = read_checkpoint(small)  # as modify_checkpoints.py --clip makes it: a tower, nothing behind it
    write_safetensors(tmp_path / "b.safetensors", {n: t for n, t in whole.items() if not n.startswith(NEW_PARTS)})
    assert main([str(tmp_path / "b.safetensors"), str(tmp_path / "b"), "--to", "diffusers", "--config", config]) == 2
    assert "'proj_out.weight'" in capsys.readouterr().err
    (tmp_path / "a" / "unet" / "config.json").write_text("[]")
    assert main([str(tmp_path / "a"), str(tmp_path / "c.safetensors"), "--to", "original"]) == 2
    assert "unet/config.json: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.safetensors", "b.safetensors"]


def test_folders_with_poor_configs(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(converted, tmp_path / "folder")
    (tmp_path / "folder" / "unet" / "config.json").write_text("{}")
    assert main([str(tmp_path / "folder"), str(tmp_path / "m.safetensors"), "--to", "original"]) == 2
    assert "'down_block_types'" in capsys.readouterr().err
    (tmp_path / "folder" / "scheduler" / "scheduler_config.json").unlink()
    assert main([str(tmp_path / "folder"), str(tmp_path / "m.safetensors"), "--to", "original"]) == 2
    assert "scheduler/scheduler_config.json" in capsys.readouterr().err


def test_a_failed_folder_leaves_the_previous_one(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main([str(small), str(folder), "--to", "diffusers"]) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def not_copied(*_: object) -> None:
        raise shutil.Error([("from", "to", "[Errno 28] No space left on device: 'from' -> 'to'")])

    def second_time(source: Path, target: Path) -> None:
        if source.suffix == ".partial" and target == folder:
            raise OSError(28, "No space left on device")
        source.rename(target)

    for where, failing in (
        ("scripts.convert_checkpoint.write_safetensors", full),
        ("scripts.convert_checkpoint.write_safetensors", not_copied),
        ("ldm.files.os.replace", second_time),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, failing)
            assert main([str(small), str(folder), "--to", "diffusers", "--overwrite"]) == 2
        error = capsys.readouterr().err
        assert "No space left" in error and "[(" not in error
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_a_link_the_folder_is_replaced(small: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    assert main([str(small), str(tmp_path / "link"), "--to", "diffusers", "--overwrite"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "model_index.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_nothing_but_a_folder_of_diffusers_is_replaced(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(small), str(tmp_path / "mine"), "--to", "diffusers", "--overwrite"]
    assert main(words) == 0
    (tmp_path / "mine" / "thesis").mkdir()
    assert main(words) == 2
    assert "mine: holds thesis" in capsys.readouterr().err
    (tmp_path / "mine" / "model_index.json").unlink()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert main(words) == 2
    assert "mine: " in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main([words[0], ".", *words[2:]]) == 2
    assert "current folder" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis").is_dir()


def test_wrong_command_lines(small: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_safetensors(
        tmp_path / "odd.safetensors", {**load_file(small), "model.diffusion_model.extra.weight": torch.ones(1)}
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    (tmp_path / "empty").mkdir()
    config = str(small.parent / "config.yaml")
    for arguments, message in (
        ([small, tmp_path / "x", "--to", "original"], "pass a diffusers folder, or --to diffusers"),
        ([converted, tmp_path / "x", "--to", "diffusers"], "is a folder already"),
        ([converted, tmp_path / "x.bin", "--to", "original"], "expected .safetensors or .ckpt"),
        ([converted, converted / "x.ckpt", "--to", "original"], "lies in the other"),
        ([tmp_path / "none.ckpt", tmp_path / "x", "--to", "diffusers"], "no such file"),
        ([tmp_path / "empty", tmp_path / "x.ckpt", "--to", "original"], "got no unet"),
        ([tmp_path / "odd.safetensors", tmp_path / "x", "--to", "diffusers", "--config", config], "extra.weight"),
        ([small, tmp_path / "x.safetensors", "--to", "diffusers"], "the result is a folder"),
        ([small, tmp_path / "mine", "--to", "diffusers"], "exists already"),
        ([small, tmp_path / "mine", "--to", "diffusers", "--overwrite"], "is not a diffusers folder"),
        ([small, converted, "--to", "diffusers"], "exists already"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine", "odd.safetensors"]
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear"


def test_dry_run_and_overwrite(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert main([str(small), str(folder), "--to", "diffusers", "--dry-run"]) == 0
    assert "PaintByExamplePipeline: " in (output := capsys.readouterr().out)
    assert "not written" in output
    assert not folder.exists()
    for arguments in ([], ["--overwrite"]):
        assert main([str(small), str(folder), "--to", "diffusers", *arguments]) == 0
    assert main([str(folder), str(tmp_path / "m.safetensors"), "--to", "original", "--dry-run"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "config.yaml").write_text("model: {}\n")
    assert main([str(folder), str(tmp_path / "m.safetensors"), "--to", "original"]) == 2
    assert "with another config" in capsys.readouterr().err


def test_configs_come_back(official: dict[str, Tensor]) -> None:
    components = to_diffusers(official)
    files = diffusers_configs(components, ModelConfig())
    configs = {path.split("/")[0]: content for path, content in files.items()}
    assert model_config(components, configs) == ModelConfig()
    with pytest.raises(CheckpointError, match="trained_betas"):
        schedule_config({"trained_betas": [0.1]})

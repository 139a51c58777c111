"""From composed-scene layout to a shareable file: cache, train on the cache, export, load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open

from ldm import load_model
from ldm.checkpoint.io import read_checkpoint, write_safetensors
from ldm.config import load_config
from ldm.data.cached import CachedDataset
from ldm.models.efficientnet import EfficientNetTower
from ldm.training import cli as train
from scripts import cache_latents, export_checkpoint

pytestmark = pytest.mark.slow


def test_cache_train_export_load(
    tmp_path: Path, dataset: Path, config_file: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, log, weights = tmp_path / "cache", tmp_path / "logs", tmp_path / "model.safetensors"
    options = [
        "--config",
        str(config_file),
        "--checkpoint",
        str(pretrained),
        "--root",
        str(dataset),
        "--out",
        str(cache),
    ]
    assert (
        cache_latents.main([*options, "--out", str(cache), "--draws", "2", "--workers", "0", "--batch-size", "5"]) == 0
    )
    scale = load_config(config_file, cache / "latents.yaml").model.scale_factor
    assert f"scale_factor={scale:.4f}" in capsys.readouterr().out
    with safe_open(cache / "train.safetensors", "np") as file:
        assert file.get_slice("keep_mask").get_shape()[0] == 2 * len(list((dataset / "bbox/train").iterdir()))
        features = torch.from_numpy(file.get_tensor("exemplar_features")).float()
    # the tower is frozen: what it makes of the exemplars is cached with them
    model = load_model(config_file, pretrained)
    exemplars = torch.stack([CachedDataset(cache, "train")[0, i]["exemplar"] for i in range(len(features))])
    # cached exemplars are rounded to 8 bits, features to 11; both are about 1
    torch.testing.assert_close(features, model.cond_stage_model.features(exemplars), rtol=0, atol=0.02)

    overrides = ["data.kind=cached", f"data.root={cache}", "trainer.max_epochs=null", "trainer.max_steps=2"]
    arguments = ["-b", str(config_file), "-l", str(log), "-n", "run", "--pretrained-model", str(pretrained)]
    assert train.main([*arguments, *overrides]) == 0
    (checkpoint,) = log.glob("*/checkpoints/last.ckpt")

    assert export_checkpoint.main([str(checkpoint), str(weights)]) == 0
    trained, shared = read_checkpoint(checkpoint), read_checkpoint(weights)
    assert shared["betas"].dtype == torch.float32
    assert shared["learnable_vector"].dtype == torch.float16
    assert "cond_stage_model.transformer.vision_model.post_layernorm.weight" in shared
    assert load_config(tmp_path / "config.yaml").model == load_config(config_file).model  # beside the weights
    model = load_model(config_file, weights)
    # float16 has 11 significant bits.
    torch.testing.assert_close(model.null_context(), trained["learnable_vector"], rtol=2**-11, atol=1e-6)


def test_export_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_safetensors(tmp_path / "in.safetensors", {"learnable_vector": torch.zeros(1, 1, 4)})
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    arguments = [str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    assert export_checkpoint.main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_bytes() == b"precious"


def test_export_refuses_what_float16_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_safetensors(tmp_path / "in.safetensors", {"learnable_vector": torch.full((1, 1, 4), 1e6)})
    assert export_checkpoint.main([str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]) == 2
    assert "learnable_vector" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_cache_names_what_is_missing(
    tmp_path: Path, config_file: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config", str(config_file), "--checkpoint", str(pretrained), "--root", str(tmp_path / "nothing")]
    assert cache_latents.main([*options, "--out", str(tmp_path / "cache")]) == 2
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


EFFICIENTNET = ("model.exemplar_encoder.tower=efficientnet-lite0", "model.exemplar_encoder.image_size=32")


def test_an_efficientnet_tower_comes_with_its_weights(
    tmp_path: Path, dataset: Path, config_file: Path, pretrained: Path
) -> None:
    """A file with the first stage alone is enough to cache and to train: the tower's weights are in a package."""
    config = tmp_path / "efficientnet.yaml"
    OmegaConf.save(load_config(config_file, overrides=EFFICIENTNET), config)
    first_stage = {k: x for k, x in read_checkpoint(pretrained).items() if k.startswith("first_stage_model.")}
    write_safetensors(tmp_path / "first_stage.safetensors", first_stage)
    start = str(tmp_path / "first_stage.safetensors")
    options = ["--config", str(config), "--checkpoint", start, "--root", str(dataset), "--workers", "0"]
    assert cache_latents.main([*options, "--out", str(tmp_path / "cache"), "--draws", "1"]) == 0

    overrides = [
        "data.kind=cached",
        f"data.root={tmp_path / 'cache'}",
        "trainer.max_epochs=null",
        "trainer.max_steps=2",
    ]
    arguments = ["-b", str(config), "-l", str(tmp_path / "logs"), "-n", "run", "--pretrained-model", start]
    assert train.main([*arguments, "--train-from-scratch", *overrides]) == 0
    (checkpoint,) = (tmp_path / "logs").glob("*/checkpoints/last.ckpt")
    model = load_model(config, checkpoint)
    expected = EfficientNetTower().imagenet_state()
    trained = model.cond_stage_model.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.items())  # frozen, statistics included

    assert export_checkpoint.main([str(checkpoint), str(tmp_path / "model.safetensors")]) == 0
    shared = load_model(config, tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shared.encode_exemplar(x), model.encode_exemplar(x), rtol=0.02, atol=0.02)  # float16

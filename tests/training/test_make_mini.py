"""The one command from material to figures: at tiny size, stopped and taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import Editor
from ldm.config import load_config
from ldm.latent_diffusion import LatentDiffusion
from scripts import make_mini
from scripts.pipeline import ROOT
from tests.material import make_material

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def arguments(config_file: Path, material: Path, tmp_path: Path) -> list[str]:
    changes = ["trainer.max_steps=2", "trainer.max_epochs=null", "data.val_batch_size=1"]
    tower = ["model.exemplar_encoder.tower=efficientnet-lite0", "model.exemplar_encoder.image_size=32"]
    for name, overrides in (
        ("first-stage", ["stage=first_stage", *changes]),
        ("model", ["data.kind=cached", *tower, *changes]),
    ):
        config = load_config(config_file, overrides=overrides)
        config.data.root = "/nowhere"  # the command says where
        OmegaConf.save(OmegaConf.structured(config), tmp_path / f"{name}.yaml")
    files = {"--first-stage": tmp_path / "first-stage.yaml", "--base": tmp_path / "model.yaml"}
    files |= {"--material": material, "--out": tmp_path / "out"}
    numbers = ["--count", "12", "--bench", "4", "--workers", "1", "--draws", "1"]
    return [*(str(word) for pair in files.items() for word in pair), *numbers]


def test_from_material_to_figures(arguments: list[str], in_process: list[list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make_mini.main(arguments) == 0
    done = [Path(command[0]).stem for command in in_process]
    assert done[:5] == ["compose", "main", "cache_latents", "main", "export_checkpoint"]
    assert done[5:] == ["inference_test_bench"] * 6 + ["evaluate", "report"]
    record = json.loads((out / "metrics.json").read_text())
    assert set(record["runs"]) == {*make_mini.PROTOCOLS, *make_mini.BASELINES, "true picture"}
    assert (out / "report" / "report.html").is_file()
    # the latents' scale was measured, not copied from the config
    scale = load_config(out / "model" / "config.yaml").model.scale_factor
    assert scale == pytest.approx(load_config(out / "cache" / "latents.yaml").model.scale_factor)
    item = out / "scenes" / "bench"
    edited = Editor.from_pretrained(out / "model").edit(
        next(item.glob("GT_*/*")), next(item.glob("Mask_*/*")), next(item.glob("Ref_*/*")), num_steps=2
    )
    assert isinstance(edited, Image.Image)

    in_process.clear()
    assert make_mini.main(arguments) == 0
    assert not in_process  # everything is there already


def test_what_cannot_be_used_is_told_before_anything_is_done(
    arguments: list[str], in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_mini.main([*arguments, "--set", "training.nonsense=1"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert not in_process


def test_dry_run_prints_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert make_mini.main([*arguments, "--device", "cpu", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n# ") + printed.startswith("# ") == 13
    assert not (tmp_path / "out").exists()


def test_the_recipe_for_a_gpu_is_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its configs merge and fit together, and its weights stay small enough to be shipped."""
    configs = [[f"{ROOT}/configs/mini{part}.yaml" for part in parts] for parts in (("", "-gpu"), ("-autoencoder",))]
    options = ["--base", *configs[0], "--first-stage", *configs[1]]
    assert make_mini.main(["--out", str(tmp_path), *options, "--dry-run"]) == 0
    assert "--size 256 --seed 0 --bench 200 --bench-size 128" in capsys.readouterr().out
    config, first_stage = (load_config(*files) for files in configs)
    assert config.model.first_stage == first_stage.model.first_stage
    with torch.device("meta"):
        model = LatentDiffusion(config.model)
    assert model.downsampling == 8
    assert 2 * sum(p.numel() for p in model.parameters()) < 40e6  # bytes in float16

"""Training inpainting by text: what moves, what captions do, and that a run goes on as if it had not stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from ldm import Editor
from ldm.checkpoint.io import read_checkpoint
from ldm.checkpoint.keys import to_module_keys
from ldm.config import Config, load_config
from ldm.latent_diffusion import load_model
from ldm.training.cli import main
from ldm.training.diffusion_module import DiffusionTraining
from ldm.training.run import Run
from scripts.export_checkpoint import main as export
from tests.training.conftest import TINY

INPUT_CONV = {f"model.diffusion_model.input_blocks.0.0.{kind}" for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def text_yaml(text_config: Config, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text-config")
    names = sorted(path.relative_to(dataset / "images").as_posix() for path in dataset.glob("images/*/*.jpg"))
    rows = [f"{name},a {('dog', 'cat')[i % 2]}" for i, name in enumerate(names)]
    (folder / "captions.csv").write_text("\n".join(["file_name,caption", *rows]))
    data = {"root": str(dataset), "captions": str(folder / "captions.csv")}
    training = {"trainable": "input_conv", "p_uncond": 0.5, "ema_decay": 0.0}
    sections = {
        "model": OmegaConf.to_container(OmegaConf.structured(text_config.model)),
        "data": {**TINY["data"], **data},
        "training": {**TINY["training"], **training},
        "logging": {**TINY["logging"], "image_every": 2},
    }
    (folder / "text.yaml").write_text(yaml.safe_dump({**TINY, **sections}))
    return folder / "text.yaml"


def train(text_yaml: Path, text_folder: Path, logs: Path, *overrides: str) -> Path:
    checkpoint = str(text_folder / "model.safetensors")
    assert main(["-b", str(text_yaml), "-l", str(logs), "--pretrained-model", checkpoint, *overrides]) == 0
    (run,) = logs.iterdir()
    return run


def test_only_the_input_conv_moves(text_yaml: Path, text_folder: Path, tmp_path: Path) -> None:
    run = train(text_yaml, text_folder, tmp_path / "logs", "trainer.max_steps=2")
    before = to_module_keys(read_checkpoint(text_folder / "model.safetensors"))
    last = run / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    moved = {name for name, tensor in state["state_dict"].items() if not tensor.equal(before[name])}
    assert moved == INPUT_CONV
    assert len(state["optimizer_states"][0]["state"]) == 2  # nothing of what is frozen
    assert (run / "images" / "step0000002.png").is_file()
    # whoever takes the checkpoint needs no word on the tokenizer
    model = load_model(run / "config.yaml", last)
    assert model.context(None, ["a dog"]).shape == (1, 12, 16)

    assert export([str(last), str(tmp_path / "shared" / "model.safetensors"), "--dtype", "float32"]) == 0
    shutil.rmtree(tmp_path / "logs")  # what is shared stands alone
    shared = Editor.from_pretrained(tmp_path / "shared").model
    assert all(torch.equal(p, state["state_dict"][name]) for name, p in shared.named_parameters())
    assert shared.text_encoder.folder == tmp_path / "shared" / "tokenizer" and shared.encode_text(["a dog"]).any()

    stopped = train(text_yaml, text_folder, tmp_path / "stopped", "trainer.max_steps=1")
    assert main(["--resume", str(stopped), "trainer.max_steps=2"]) == 0
    resumed = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, state["state_dict"][name]) for name, tensor in resumed.items())


@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        ("input_conv", lambda name: name in INPUT_CONV),
        ("input_conv_attention", lambda name: name in INPUT_CONV or ".attn1." in name or ".attn2." in name),
        ("all", lambda name: name.startswith("model.diffusion_model.")),
    ],
)
def test_what_is_trained(text_yaml: Path, trainable: str, trained: object) -> None:
    assert callable(trained)
    module = DiffusionTraining(load_config(text_yaml, overrides=[f"training.trainable={trainable}"]))
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad is trained(name), name


@pytest.mark.parametrize("p_uncond", [0.0, 1.0])
def test_captions_and_their_dropping(text_yaml: Path, text_folder: Path, tmp_path: Path, p_uncond: float) -> None:
    run = Run(load_config(text_yaml, overrides=[f"training.p_uncond={p_uncond}"]), tmp_path)
    run.initialise(str(text_folder / "model.safetensors"), from_scratch=False, resuming=False)
    assert isinstance(run.module, DiffusionTraining)
    batch = next(iter(run.data.train_dataloader()))
    assert set(batch["caption"]) <= {"a dog", "a cat"}
    with torch.no_grad():
        losses, _ = run.module.losses(batch)
        of_empty, _ = run.module.losses({**batch, "caption": [""] * 2})
    if p_uncond:  # all are dropped: what they said has no effect
        torch.testing.assert_close(losses, of_empty, rtol=0, atol=1e-6)
    else:
        assert (losses - of_empty).abs().min() > 1e-5


def test_errors_are_one_line(
    text_yaml: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lonely = tmp_path / "lonely.safetensors"
    lonely.symlink_to(text_folder / "model.safetensors")
    start = ["-b", str(text_yaml), "-l", str(tmp_path / "logs"), "--pretrained-model"]
    for words, message in (
        ([str(lonely)], "tokenizer"),
        ([str(text_folder / "model.safetensors"), "data.captions=/nowhere.csv"], "/nowhere.csv"),
        ([str(text_folder / "model.safetensors"), "data.captions=classes"], "data.captions"),
        ([str(text_folder / "model.safetensors"), "training.lora_rank=2"], "training.trainable: got 'input_conv'"),
        ([str(text_folder / "model.safetensors"), "training.trainable=some"], "training.trainable: got 'some'"),
    ):
        assert main([*start, *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "logs").exists()

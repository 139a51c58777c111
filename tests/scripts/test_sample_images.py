"""The script that samples pixel models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.config import dump_config
from ldm.evaluation.samples import read_images
from ldm.pixel_diffusion import Classifier, PixelDiffusion
from scripts import sample_images
from tests.pixel import tiny_config

Sample = Callable[..., tuple[int, Path]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ten classes and a classifier, with random weights, in this project's layout, and their configs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    config = tiny_config(Path("unused"))
    model = PixelDiffusion(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"state_dict": model.state_dict()}, folder / "model.ckpt")
    (folder / "model.yaml").write_text(dump_config(config))
    (folder / "classes.json").write_text('["zero", "one", "two", "3", "4", "5", "6", "7", "8", "nine"]')
    overrides = ("model.kind=classifier", "model.classifier.num_classes=10", "model.unet.resample=res_block")
    config = tiny_config(Path("unused"), "stage=classifier", *overrides)
    torch.save({"state_dict": Classifier(config.model).state_dict()}, folder / "classifier.ckpt")
    (folder / "classifier.yaml").write_text(dump_config(config))
    return folder


@pytest.fixture
def sample(folder: Path, tmp_path: Path) -> Sample:
    def run(*words: object, outdir: str = "out") -> tuple[int, Path]:
        out = tmp_path / outdir
        fixed = (folder / "model.ckpt", "--outdir", out, "--timesteps", "3", "--num", "5", "--batch-size", "2")
        return sample_images.main([str(word) for word in (*fixed, "--device", "cpu", *words)]), out

    return run


def batch(out: Path) -> tuple[np.ndarray, np.ndarray]:
    (path,) = out.glob("samples_*.npz")
    with np.load(path) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def test_grid_and_batch(sample: Sample) -> None:
    status, out = sample("--npz")
    images, labels = batch(out)
    assert status == 0 and images.shape == (5, 8, 8, 1) and images.dtype == np.uint8 and labels.shape == (5,)
    assert (out / "samples_5x8x8x1.npz").is_file()
    assert Image.open(out / "grid.png").size == (16, 24)  # two columns, three rows
    assert np.array_equal(np.concatenate([*read_images(out / "samples_5x8x8x1.npz", 2)]), images)


def test_an_image_depends_on_seed_and_number_alone(sample: Sample) -> None:
    first = batch(sample("--npz")[1])[0]
    others = batch(sample("--npz", "--batch-size", "3", outdir="b")[1])[0]
    assert np.abs(first.astype(int) - others).max() <= 1  # other batches round differently
    assert not np.array_equal(first, batch(sample("--npz", "--seed", "1", outdir="c")[1])[0])


def test_an_interrupted_run_goes_on(sample: Sample) -> None:
    _, out = sample("--npz")
    images, _ = batch(out)
    part = out / "parts" / "00000002.npz"
    part.unlink()
    untouched = (out / "parts" / "00000000.npz").stat().st_mtime_ns
    sample("--npz")
    assert np.array_equal(batch(out)[0], images)
    assert (out / "parts" / "00000000.npz").stat().st_mtime_ns == untouched
    assert sample("--seed", "7")[0] == 2  # not into samples of another seed


def test_processes_take_their_shares(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    _, out = sample("--npz")
    assert [path.name for path in (out / "parts").glob("*.npz")] == ["00000002.npz"] and not (out / "grid.png").exists()
    monkeypatch.setenv("RANK", "0")
    assert sample("--npz")[0] == 0 and batch(out)[0].shape[0] == 5


def test_classes_by_name_and_number(sample: Sample) -> None:
    assert batch(sample("--npz", "--classes", "two", "3", "1")[1])[1].tolist() == [2, 3, 1, 2, 3]


@pytest.mark.parametrize("options", [(), ("--sampler", "ddim", "--timesteps", "ddim4")])
def test_guidance_changes_samples(sample: Sample, folder: Path, options: tuple[str, ...]) -> None:
    plain = batch(sample("--npz", *options)[1])[0]
    kinds = {"scale": ("--guidance-scale", "3"), "classifier": ("--classifier", folder / "classifier.ckpt")}
    for name, words in kinds.items():
        scale = ("--classifier-scale", "1000") if name == "classifier" else ()
        assert not np.array_equal(plain, batch(sample("--npz", *options, *words, *scale, outdir=name)[1])[0]), name


@pytest.mark.parametrize(
    "words",
    [
        ("--classes", "cat"),
        ("--classes", "10"),
        ("--sampler", "dpm"),
        ("--timesteps", "ddim7x"),
        ("--timesteps", "200"),
        ("--num", "0"),
        ("--classifier", "{folder}/model.ckpt"),
        ("--config", "nothing.yaml"),
    ],
)
def test_wrong_options_end_in_a_line(
    sample: Sample, folder: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = sample(*(word.format(folder=folder) for word in words))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and error.startswith("error: ") and not list(out.glob("**/*.npz"))


def test_a_published_layout_needs_its_config(tmp_path: Path, folder: Path) -> None:
    """Bare names, as the other projects write them; shapes tell all but schedule, heads and size."""
    state = torch.load(folder / "model.ckpt")["state_dict"]
    torch.save({name.removeprefix("model.diffusion_model."): x for name, x in state.items()}, tmp_path / "own.pt")
    words = [str(tmp_path / "own.pt"), "--outdir", str(tmp_path / "out"), "--num", "1", "--timesteps", "2"]
    assert sample_images.main(words) == 2
    keys = {"image_size": 8, "schedule": {"name": "cosine"}, "unet": {"num_heads": 2, "norm_groups": 8}}
    OmegaConf.save(OmegaConf.create({"model": keys}), tmp_path / "own.yaml")
    assert sample_images.main(words) == 0


def test_an_upsampler_enlarges_a_batch_with_its_labels(tmp_path: Path) -> None:
    overrides = ("model.input_channels=[x_t,low_res]", "model.unet.in_channels=2", "model.small_size=4")
    config = tiny_config(Path("unused"), *overrides)
    torch.save({"state_dict": PixelDiffusion(config.model).state_dict()}, tmp_path / "up.ckpt")
    (tmp_path / "up.yaml").write_text(dump_config(config))
    small = np.zeros((3, 4, 4, 1), np.uint8)
    words = [tmp_path / "up.ckpt", "--outdir", tmp_path / "out", "--num", "3", "--timesteps", "2", "--npz"]
    words = [str(word) for word in words]
    assert sample_images.main(words) == 2  # what does it enlarge?
    np.savez(tmp_path / "small.npz", arr_0=small, arr_1=np.array([7, 0, 9]))
    assert sample_images.main([*words, "--low-res", str(tmp_path / "small.npz")]) == 0
    images, labels = batch(tmp_path / "out")
    assert images.shape == (3, 8, 8, 1) and labels.tolist() == [7, 0, 9]
    np.savez(tmp_path / "small.npz", arr_0=small[:2])
    assert sample_images.main([*words, "--low-res", str(tmp_path / "small.npz"), "--seed", "1"]) == 2

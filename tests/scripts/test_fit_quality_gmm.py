from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm.evaluation import features
from ldm.evaluation.quality import load_gmm, quality_scores
from ldm.images import find_images

mixture = pytest.importorskip("sklearn.mixture")
script = importlib.import_module("scripts.fit_quality_gmm")


class MeanColours(nn.Module):
    """Stands for a feature network: the means of a picture's channels."""

    name, key, dim = "mean colours", "mean-colours", 3

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing = {"whole": "as it is"}
        self.anchor = nn.Parameter(torch.zeros(1))

    def preprocess(self, image: Image.Image, rule: str, box: object = None) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) + self.anchor


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "load_network", lambda spec, device="cpu": MeanColours())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 pictures of two kinds, in subfolders and in all formats, beside files that are none."""
    rng = np.random.default_rng(0)
    for k in range(24):
        pixels = rng.normal((60, 90, 120) if k % 2 else (200, 150, 90), 8, (8, 8, 3)).clip(0, 255).astype(np.uint8)
        path = tmp_path / "pictures" / f"{k % 3}" / f"{k:02}.{('png', 'jpg', 'webp', 'JPEG')[k % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "pictures" / "list.txt").write_text("24")
    return tmp_path / "pictures"


def run(folder: Path, out: Path, *options: str) -> int:
    return script.main([str(folder), "--out", str(out), "--cache", "none", "--device", "cpu", *options])


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize("covariance", script.COVARIANCES)
def test_fits_what_scikit_learn_fits(folder: Path, tmp_path: Path, covariance: str) -> None:
    out = tmp_path / "gmm.safetensors"
    assert run(folder, out, "--components", "2", "--covariance", covariance, "--batch-size", "5") == 0
    gmm = load_gmm(out)
    network = MeanColours()
    with torch.no_grad():
        x = np.stack([network(network.preprocess(Image.open(p), "whole")[None])[0] for p in find_images(folder)])
    estimator = mixture.GaussianMixture(2, covariance_type=covariance, random_state=0).fit(x.astype(np.float64))
    # The same iterations, interrupted: only summation differs.
    assert np.allclose(gmm.log_density(x), estimator.score_samples(x.astype(np.float64)), rtol=1e-9)
    assert quality_scores(gmm.log_density(x)).shape == (24,)
    assert gmm.provenance.items() >= {
        "refitted": "yes",
        "network": "mean colours",
        "preprocessing": "as it is",
        "folder": "pictures",
        "pictures": "24",
        "components": "2",
        "covariance_type": covariance,
    }.items()  # fmt: skip


@pytest.mark.usefixtures("colours")
def test_limit_and_digest(folder: Path, tmp_path: Path) -> None:
    def provenance() -> dict[str, str]:
        options = ("--components", "2", "--covariance", "diag", "--limit", "10")
        assert run(folder, tmp_path / "gmm", *options) == 0
        return load_gmm(tmp_path / "gmm").provenance

    first = provenance()
    assert first["pictures"] == "10"
    (folder / "0" / "00.png").rename(folder / "0" / "01.png")
    assert provenance()["pictures_sha256"] == first["pictures_sha256"]
    Image.new("RGB", (8, 8)).save(folder / "0" / "01.png")
    assert provenance()["pictures_sha256"] != first["pictures_sha256"]


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--components", "20"], "got 24 "),
        (["--components", "0"], "expected 1 or more"),
        (["--limit", "0"], "expected 1 or more"),
    ],
)
def test_bad_requests_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(folder, tmp_path / "gmm", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "gmm").exists()


@pytest.mark.usefixtures("colours")
def test_damaged_or_missing_pictures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "gmm") == 2
    assert "nowhere: " in capsys.readouterr().err
    options = ["--components", "2", "--covariance", "diag"]
    assert run(folder, tmp_path / "whole", *options) == 0
    broken = folder / "1" / "broken.png"
    broken.write_bytes((folder / "0" / "00.png").read_bytes()[:-30])
    capsys.readouterr()
    assert run(folder, tmp_path / "gmm", *options, "--strict") == 2
    assert f"{broken}: damaged" in capsys.readouterr().err
    assert run(folder, tmp_path / "gmm", *options) == 0
    assert f"{broken}: damaged" in capsys.readouterr().err
    first, second = (load_gmm(tmp_path / name).provenance for name in ("whole", "gmm"))
    assert first == second
    assert run(folder, tmp_path / "gmm", "--components", "2", "--limit", "4") == 0
    (folder / "0" / "00.png").write_bytes(broken.read_bytes())
    assert run(folder, tmp_path / "gmm", "--components", "2", "--limit", "4") == 2  # three are too few


def test_an_impossible_fit_is_one_line() -> None:
    options: dict[str, Any] = {"components": 2, "covariance": "full", "seed": 0, "provenance": {}}
    with pytest.raises(ValueError, match="no mixture could be fitted"):
        script.fit_mixture(np.full((9, 3), np.nan), **options)

"""Figures of samples in pixel space: batches against reference batches, and bits per dimension.

A batch is an `.npz` with `arr_0` (N, H, W, C) uint8; reference batches of guided-diffusion also hold the statistics of
their whole training set. Dimensions: N images · S diffusion steps · D feature channels.
"""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.evaluation.features import WHOLE, FeatureNetwork, finite_features
from ldm.evaluation.frechet import Estimate, Statistics, frechet_distance, neighbours, statistics_of
from ldm.evaluation.inception import LOGITS, POOLED, SPATIAL, inception_score
from ldm.evaluation.metrics import mean_interval
from ldm.files import UserError
from ldm.pixel_diffusion import PixelDiffusion

SCORE_PART = 5000  # samples of which each Inception score is computed
Figures = dict[str, Estimate]


def read_images(path: str | Path, batch_size: int) -> Iterator[np.ndarray]:
    """Yield the images of a batch, (at most batch_size, H, W, C) uint8 at a time, without loading the others."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = header[version](file)
            if dtype != np.uint8 or len(shape) != 4 or fortran:
                raise ValueError(f"got {shape} in {dtype}, expected (N, H, W, C) in uint8")
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                content = file.read(count * int(np.prod(shape[1:])))
                yield np.frombuffer(content, np.uint8).reshape(count, *shape[1:])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no batch of images, arr_0 in .npz: {error}") from None


def batch_features(network: FeatureNetwork, path: Path, batch_size: int = 64) -> np.ndarray:
    """Compute the features (N, D) float32 of a batch's images."""
    rows, done = [], 0
    for images in tqdm(read_images(path, batch_size), desc=path.name, unit="batch", disable=None, leave=False):
        views = [network.preprocess(Image.fromarray(image.squeeze()), WHOLE) for image in images]
        names = [f"{path}: image {done + i}" for i in range(len(images))]
        rows.append(finite_features(network, torch.stack(views), names))
        done += len(images)
    return np.concatenate(rows)


def compare_batches(samples: Path, reference: Path, network: FeatureNetwork, batch_size: int = 64) -> Figures:
    """Compare a batch of samples with a reference batch, as guided-diffusion's evaluator does.

    With the Inception network of 2015: `fid` and `sfid` (to the reference's own statistics, where it holds them), `is`,
    `precision`, `recall`; with another network all but `sfid` and `is`, under its name, and to the images' statistics.

    Source: Dhariwal & Nichol 2021, section 2.2.
    """
    is_inception = network.dim == LOGITS.stop
    ours, theirs = (batch_features(network, path, batch_size) for path in (samples, reference))
    parts = {"fid": POOLED, "sfid": SPATIAL} if is_inception else {"fid": slice(None)}
    figures = {}
    for (name, columns), (mean, covariance) in zip(parts.items(), (("mu", "sigma"), ("mu_s", "sigma_s")), strict=False):
        with np.load(reference, allow_pickle=False) as arrays:
            own = is_inception and mean in arrays
            real = Statistics(0, arrays[mean], arrays[covariance]) if own else statistics_of(theirs[:, columns])
        value = frechet_distance(statistics_of(ours[:, columns].astype(np.float64)), real)
        note = "; to the reference's own statistics" if own else f"; to {len(theirs)} images"
        figures[name] = Estimate(value, np.nan, np.nan, len(ours), note)
    if is_inception:
        logits = ours[:, LOGITS]
        scores = [inception_score(logits[i : i + SCORE_PART], splits=1).value for i in range(0, len(ours), SCORE_PART)]
        figures["is"] = Estimate(float(np.mean(scores)), np.nan, np.nan, len(ours), f"; parts of {SCORE_PART}")
    columns = POOLED if is_inception else slice(None)
    covered = neighbours(theirs[:, columns], ours[:, columns])
    for name, share in zip(("precision", "recall"), covered, strict=True):
        figures[name] = mean_interval(share)
    return figures


def bits_per_dim(
    model: PixelDiffusion, data: Dataset, *, steps: str = "", batch_size: int = 16, seed: int = 0
) -> tuple[Estimate, dict[str, np.ndarray]]:
    """Bound the negative log-likelihood of a dataset's images, of samples as `ImageDataset` gives them.

    Returns the mean bound and, as the published script saves them, the means over images of `vb`, `mse` and `x_0_mse`,
    (S,) in rising order of the steps, with the bounds `total` (N,).
    """
    terms: dict[str, list[np.ndarray]] = {"total": [], "vb": [], "mse": [], "x_0_mse": []}
    order: Sequence[tuple[int, int]] = [(0, i) for i in range(len(data))]  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(seed)
    for batch in tqdm(DataLoader(data, batch_size, sampler=order), desc="bits per dim", unit="batch", disable=None):  # pyright: ignore[reportArgumentType]
        x_0 = batch["image"].to(model.ac.device)
        labels = batch["label"].to(model.ac.device) if model.config.unet.num_classes else None
        result = model.bits_per_dim(
            x_0, labels, steps=steps, noise=lambda x=x_0: torch.randn(x.shape, generator=generator).to(x.device)
        )
        for name, values in terms.items():
            values.append(result[name].cpu().numpy())
    total = np.concatenate(terms.pop("total"))
    means = {name: np.concatenate(values).mean(0) for name, values in terms.items()}
    return mean_interval(total, seed=seed), {**means, "total": total}

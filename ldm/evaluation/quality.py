"""Quality score (QS): the likelihood of an image's features under a Gaussian mixture of real images' features.

The published figures use 20 components over CLIP ViT-B/32 features of COCO, in a pickle of scikit-learn, and drop the
remainder of their batches of 50 images; here every image counts.

Dimensions: N images · D feature channels · K components.
"""

import json
import pickle
import warnings
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.checkpoint.io import read_checkpoint, read_metadata, sha256_file, write_safetensors
from ldm.files import UserError

QS_FULL_MARKS = 300.0  # log density that scores 100 %
_ARRAYS = ("weights", "means", "covariances")


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A fitted `sklearn.mixture.GaussianMixture`; its origin has the key "refitted" unless it is the published one."""

    estimator: Any
    provenance: Mapping[str, str]

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Compute the natural logarithm of the density at features (N, D): (N,) float64."""
        d = self.estimator.means_.shape[1]
        if x.shape[1] != d:
            network = self.provenance.get("network", "the network of the mixture")
            raise UserError(f"got features of {x.shape[1]} channels, the mixture has {d}; use {network}")
        with np.errstate(divide="ignore"):  # a component of weight 0 has log weight -inf, which is right
            return self.estimator.score_samples(x.astype(np.float64))

    def save(self, path: str | Path) -> None:
        """Write the mixture as safetensors, atomically; `load_gmm` reads it."""
        arrays = {name: np.ascontiguousarray(getattr(self.estimator, f"{name}_")) for name in _ARRAYS}
        metadata = {"covariance_type": self.estimator.covariance_type, "provenance": json.dumps(dict(self.provenance))}
        write_safetensors(path, {name: torch.from_numpy(array) for name, array in arrays.items()}, metadata)


def quality_scores(log_density: np.ndarray) -> np.ndarray:
    """Convert log densities (N,) to per cent of full marks; QS is their mean."""
    return 100 * np.clip(log_density / QS_FULL_MARKS, 0, 1)


def load_gmm(path: str | Path) -> GaussianMixture:
    """Read a mixture from `GaussianMixture.save` or from a pickle of scikit-learn, without running code in it.

    UserError if scikit-learn is missing, or if the file is missing, damaged, wants to run code or holds no density.
    """
    path = Path(path)
    if not find_spec("sklearn"):
        raise UserError('QS needs scikit-learn; do pip install -e ".[eval]"')
    try:
        is_pickle = path.is_file() and path.read_bytes()[:1] in (pickle.PROTO, pickle.GLOBAL)  # GLOBAL: protocols 0, 1
        mixture = (_from_pickle if is_pickle else _from_safetensors)(path)
        fitted = mixture.estimator
        if abs(fitted.weights_.sum() - 1) > 1e-6 or (fitted.weights_ < 0).any():
            raise ValueError("the weights are no shares")
        if not np.isfinite(mixture.log_density(fitted.means_)).all():
            raise ValueError("means or covariances are nan or infinite")
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: no GaussianMixture ({reason}); fit one with scripts/fit_quality_gmm.py") from error
    return mixture


def _from_safetensors(path: Path) -> GaussianMixture:
    from sklearn.mixture import GaussianMixture as Estimator
    from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

    metadata, tensors = read_metadata(path), read_checkpoint(path)
    weights, means, covariances = (tensors[name].numpy() for name in _ARRAYS)
    kind, (k, d) = metadata["covariance_type"], means.shape
    if covariances.shape != {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}[kind]:
        raise UserError(f"got {kind} covariances of shape {covariances.shape} for means {means.shape}")
    estimator: Any = Estimator(k, covariance_type=kind)  # pyright: ignore[reportArgumentType]
    estimator.weights_, estimator.means_, estimator.covariances_ = weights, means, covariances
    estimator.precisions_cholesky_ = _compute_precision_cholesky(covariances, kind)
    return GaussianMixture(estimator, json.loads(metadata["provenance"]))


def _from_pickle(path: Path) -> GaussianMixture:
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of files from other versions of itself
        estimator = _MixtureUnpickler(file, encoding="latin1").load()  # latin1: bytes from Python 2
    version = str(getattr(estimator, "_sklearn_version", "unknown"))
    return GaussianMixture(estimator, {"file": path.name, "sha256": sha256_file(path), "scikit-learn": version})


class _Ignored:
    """Replaces random states, which no density needs."""

    def __init__(self, *_: object) -> None: ...

    __setstate__ = __init__


# Names in a pickled mixture whose classes and functions are inert: they build objects and run nothing.
_ALLOWED = """
    sklearn.mixture._gaussian_mixture.GaussianMixture builtins.object copyreg._reconstructor numpy.dtype numpy.ndarray
    numpy._core.numeric._frombuffer numpy._core.multiarray._reconstruct numpy._core.multiarray.scalar _codecs.encode
"""


class _MixtureUnpickler(pickle.Unpickler):
    """Builds only what a pickled mixture is made of; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        # of Python 2, of numpy before 2 and of scikit-learn before 0.22
        module = IMPORT_MAPPING.get(module, module).replace("numpy.core", "numpy._core")
        module = module.replace("mixture.gaussian", "mixture._gaussian")
        if "." not in name and f"{module}.{name}" in _ALLOWED.split():
            return super().find_class(module, name)
        if module.startswith("numpy.random."):
            return _Ignored
        convert = "if you trust it, rewrite it with `pickle.dump(joblib.load(FILE), open(NEW, 'wb'))`"
        remedy = convert if "joblib" in module else "get it elsewhere, or fit one with scripts/fit_quality_gmm.py"
        raise UserError(f"refused: the pickle wants {module}.{name}, which no mixture needs; {remedy}")

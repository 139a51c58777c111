"""Quality score (QS): the likelihood of an image's features under a Gaussian mixture of real images' features.

An image scores its log density / 300, clipped to [0, 1], in per cent; a set of images scores the mean. The published
figures use 20 components over CLIP ViT-B/32 features of COCO, distributed as a pickle of scikit-learn.

The published script scores whole batches of 50 images in the order of the file system and drops the remainder. Here
every image counts.

Dimensions: N images · D feature channels · K components.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.checkpoint.io import CheckpointError, read_checkpoint, read_metadata, sha256_file, write_safetensors
from ldm.files import UserError

QS_FULL_MARKS = 300.0  # log density that scores 100 %
_ARRAYS = ("weights", "means", "covariances")


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A fitted mixture of scikit-learn with its origin.

    Attributes:
        estimator: `sklearn.mixture.GaussianMixture` or `BayesianGaussianMixture`.
        provenance: where it comes from; has the key "refitted" if it is not the published mixture.

    Raises:
        UserError: the estimator is not fitted, or its numbers do not describe a density.
    """

    estimator: Any
    provenance: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in (*_ARRAYS, "precisions_cholesky"):
            array = getattr(self.estimator, f"{name}_", None)
            if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
                raise UserError(f"the mixture has no numbers {name}_; was it fitted?")
        weights, means = self.estimator.weights_, self.estimator.means_
        if not abs(weights.sum() - 1) < 1e-6 or (weights < 0).any():
            raise UserError(f"the weights sum to {weights.sum():.6g} or some are negative, expected a sum of 1")
        if not np.isfinite(means).all() or not np.isfinite(self.log_density(means)).all():
            raise UserError("means, covariances or precisions are nan or infinite")

    @property
    def weights(self) -> np.ndarray:
        """The components' weights (K,)."""
        return self.estimator.weights_

    @property
    def covariance_type(self) -> str:
        """The form of the covariances: full, tied, diag or spherical."""
        return self.estimator.covariance_type

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Compute the natural logarithm of the density at features (N, D): (N,) float64.

        Raises:
            UserError: the features have another D than the mixture.
        """
        d = self.estimator.means_.shape[-1]
        if x.ndim != 2 or x.shape[1] != d:
            fitted_with = self.provenance.get("network", "the network that the mixture was fitted with")
            raise UserError(f"got features of shape {x.shape}, expected (N, {d}); use {fitted_with}")
        with np.errstate(divide="ignore"):  # a component of weight 0 has log weight -inf, which is right
            return self.estimator.score_samples(x.astype(np.float64))

    def save(self, path: str | Path) -> None:
        """Write the mixture as safetensors, atomically; `load_gmm` reads it.

        Raises:
            CheckpointError: the disk is full or the folder is not writable.
        """
        arrays = {name: np.ascontiguousarray(getattr(self.estimator, f"{name}_")) for name in _ARRAYS}
        metadata = {"covariance_type": self.estimator.covariance_type, "provenance": json.dumps(dict(self.provenance))}
        write_safetensors(path, {name: torch.from_numpy(array) for name, array in arrays.items()}, metadata)


def mixture_of(
    weights: np.ndarray,
    means: np.ndarray,
    covariances: np.ndarray,
    covariance_type: str,
    provenance: Mapping[str, str],
) -> GaussianMixture:
    """Make a mixture from its parameters.

    Args:
        weights: (K,), sum 1.
        means: (K, D).
        covariances: full (K, D, D) · tied (D, D) · diag (K, D) · spherical (K,).
        covariance_type: full, tied, diag or spherical.
        provenance: see `GaussianMixture`.

    Raises:
        UserError: scikit-learn is missing, or the numbers do not describe a density.
    """
    k, d = means.shape
    shapes = {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}
    if covariances.shape != shapes.get(covariance_type) or weights.shape != (k,):
        raise UserError(
            f"got {covariance_type} covariances of shape {covariances.shape} and {len(weights)} weights for means of "
            f"shape {means.shape}"
        )
    estimator = _sklearn_mixture().GaussianMixture(len(weights), covariance_type=covariance_type)
    from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

    estimator.weights_, estimator.means_, estimator.covariances_ = weights, means, covariances
    try:
        with np.errstate(all="raise"):
            estimator.precisions_cholesky_ = _compute_precision_cholesky(covariances, covariance_type)
    except (ValueError, FloatingPointError) as error:
        raise UserError("the covariances are not positive definite") from error
    return GaussianMixture(estimator, provenance)


def quality_scores(log_density: np.ndarray) -> np.ndarray:
    """Convert log densities (N,) to per cent of full marks; QS is their mean."""
    return 100 * np.clip(log_density / QS_FULL_MARKS, 0, 1)


def load_gmm(path: str | Path) -> GaussianMixture:
    """Read a mixture from `GaussianMixture.save` or from a pickle of scikit-learn, without running code in it.

    Raises:
        UserError: the file is missing, damaged, not a mixture, wants to run code, or does not describe a density.
    """
    path = Path(path)
    try:
        return _from_pickle(path) if _is_pickle(path) else _from_safetensors(path)
    except CheckpointError:
        raise  # names the file already
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"{path}: neither a mixture of scripts/fit_quality_gmm.py nor a pickle of scikit-learn, or damaged "
            f"({type(error).__name__}: {error}); download it again or fit one"
        ) from error


def _sklearn_mixture() -> Any:
    try:
        import sklearn.mixture
    except ImportError as error:
        raise UserError(f'{error}: QS needs the "eval" extra; do pip install -e ".[eval]"') from error
    return sklearn.mixture


def _is_pickle(path: Path) -> bool:
    """Return whether a file begins as a pickled object: with its protocol or, before protocol 2, a class."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(1) in (pickle.PROTO, pickle.GLOBAL)


def _from_safetensors(path: Path) -> GaussianMixture:
    metadata, tensors = read_metadata(path), read_checkpoint(path)
    weights, means, covariances = (tensors[name].numpy() for name in _ARRAYS)
    return mixture_of(weights, means, covariances, metadata["covariance_type"], json.loads(metadata["provenance"]))


def _from_pickle(path: Path) -> GaussianMixture:
    sklearn_mixture = _sklearn_mixture()
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of files from other versions of itself
        estimator = _MixtureUnpickler(file, encoding="latin1").load()  # latin1: bytes from Python 2
    if not isinstance(estimator, (sklearn_mixture.GaussianMixture, sklearn_mixture.BayesianGaussianMixture)):
        kind = type(estimator).__name__
        raise UserError(f"holds a {kind}, not a Gaussian mixture; pass the fitted mixture itself")
    provenance = {
        "class": type(estimator).__name__,
        "file": path.name,
        "sha256": sha256_file(path),
        "scikit-learn": str(getattr(estimator, "_sklearn_version", "unknown")),
    }
    return GaussianMixture(estimator, provenance)


class _Ignored:
    """Replaces random states, which no density needs."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _encode(text: str, encoding: str) -> bytes:
    """Build bytes as pickle protocols below 3 write them."""
    if encoding != "latin1":
        raise UserError(f"holds bytes encoded as {encoding!r}, which no pickled array does")
    return text.encode("latin1")


# Names in a pickled mixture whose classes and functions are inert: they build objects and run nothing.
_ALLOWED = {
    *(
        ("sklearn.mixture._gaussian_mixture", "GaussianMixture"),
        ("sklearn.mixture._bayesian_mixture", "BayesianGaussianMixture"),
    ),
    *(("numpy", "ndarray"), ("numpy", "dtype"), ("numpy._core.numeric", "_frombuffer")),
    *(("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar")),
    *(("copyreg", "_reconstructor"), ("builtins", "object")),
}
_RENAMED_MODULES = {
    "numpy.core.multiarray": "numpy._core.multiarray",  # before numpy 2
    "numpy.core.numeric": "numpy._core.numeric",
    "sklearn.mixture.gaussian_mixture": "sklearn.mixture._gaussian_mixture",  # before scikit-learn 0.22
    "sklearn.mixture.bayesian_mixture": "sklearn.mixture._bayesian_mixture",
    "copy_reg": "copyreg",  # Python 2
    "__builtin__": "builtins",
}


class _MixtureUnpickler(pickle.Unpickler):
    """Builds only what a pickled mixture is made of; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        module = _RENAMED_MODULES.get(module, module)
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if module.startswith("numpy.random."):
            return _Ignored
        if "joblib" in module:
            raise UserError(
                "written by joblib; if you trust it, rewrite it with `pickle.dump(joblib.load(FILE), open(NEW, 'wb'))`"
            )
        raise UserError(
            f"refused: the pickle wants {module}.{name}, which no Gaussian mixture needs; "
            "don't use this file, get it elsewhere or fit one with scripts/fit_quality_gmm.py"
        )

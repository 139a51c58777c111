"""`golden/eval` holds features of 60 + 60 pictures, mixtures, and what the published script made of them."""

from __future__ import annotations

import io
import json
import os
import pickle
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ldm.evaluation.quality import GaussianMixture, load_gmm, quality_scores
from ldm.files import UserError
from tests.procweights import read_golden

GOLDEN = Path(__file__).parent.parent / "golden" / "eval"
TYPES = ("full", "tied", "diag", "spherical")
# The 10 of 60 pictures that the published script left out: the last ones in the file system's order.
LEFT_OUT = (3, 6, 14, 15, 30, 31, 32, 40, 47, 51)


def fitted(covariance_type: str) -> tuple[Any, np.ndarray]:
    """A fitted scikit-learn mixture and features to score."""
    mixture = pytest.importorskip("sklearn.mixture")
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(m, s, (60, 5)) for m, s in ((0, 1), (4, 0.5), (-3, 2))])
    seed = np.random.RandomState(0)
    estimator = mixture.GaussianMixture(3, covariance_type=covariance_type, random_state=seed, max_iter=500)
    return estimator.fit(x), rng.normal(0, 4, (200, 5))


def mixture_of(
    weights: np.ndarray, means: np.ndarray, covariances: np.ndarray, covariance_type: str, provenance: dict[str, str]
) -> GaussianMixture:
    """Read a mixture that consists of these arrays."""
    arrays = {"weights": weights, "means": means, "covariances": np.ascontiguousarray(covariances)}
    with NamedTemporaryFile(suffix=".safetensors") as file:
        save_file(arrays, file.name, {"covariance_type": covariance_type, "provenance": json.dumps(provenance)})
        return load_gmm(file.name)


def dump(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


# ---- goldens ----


@pytest.mark.parametrize("name", ["k20_diag", "k20_spherical"])
def test_golden(name: str) -> None:
    features, arrays = (
        {name: tensor.numpy() for name, tensor in read_golden(f"eval/{file}").items()} for file in ("features", "gmm")
    )
    expected = json.loads((GOLDEN / "golden_eval.json").read_text())[f"qs_{name}"]
    parts = (arrays[f"{name}/{part}"] for part in ("weights", "means", "covariances"))
    gmm = mixture_of(*parts, covariance_type=name.removeprefix("k20_"), provenance={})

    # The real pictures were scored in float64.
    assert np.allclose(gmm.log_density(features["feat_gt"]), arrays[f"{name}/score_gt"], rtol=1e-12, atol=0)
    # scikit-learn scored the generated images in float32: its scores are off by 7.6e-5, their mean by 8e-7
    density = gmm.log_density(features["feat_gen"])
    assert np.allclose(density, arrays[f"{name}/score_gen"], rtol=2e-4, atol=0)
    scores = quality_scores(density)
    assert scores.mean() == pytest.approx(expected["all60_qs"], rel=2e-6)
    kept = np.delete(scores, LEFT_OUT)
    assert len(kept) == expected["n_scored"]
    # The script computed the features again: float32 rounding of the network on top.
    assert kept.mean() == pytest.approx(float(expected["official_stdout"][-1]), rel=1e-6)


def test_scores_are_clipped_shares_of_300() -> None:
    assert quality_scores(np.array([-500.0, 0.0, 150.0, 300.0, 900.0])).tolist() == [0.0, 0.0, 50.0, 100.0, 100.0]


# ---- scikit-learn's mixtures ----


@pytest.mark.parametrize("covariance_type", TYPES)
@pytest.mark.parametrize("protocol", range(6))
def test_equals_scikit_learn(tmp_path: Path, covariance_type: str, protocol: int) -> None:
    estimator, x = fitted(covariance_type)
    gmm = load_gmm(dump(tmp_path / "gmm.pkl", estimator, protocol))
    assert gmm.estimator.covariance_type == covariance_type
    assert np.allclose(gmm.log_density(x), estimator.score_samples(x), rtol=1e-11, atol=0)
    gmm.save(tmp_path / "gmm.safetensors")
    again = load_gmm(tmp_path / "gmm.safetensors")
    assert np.allclose(again.log_density(x), estimator.score_samples(x), rtol=1e-11, atol=0)
    assert again.provenance == gmm.provenance
    assert gmm.provenance["file"] == "gmm.pkl"
    assert "refitted" not in gmm.provenance


@pytest.mark.parametrize(
    "old",
    [(b"sklearn.mixture._gaussian_mixture", b"sklearn.mixture.gaussian_mixture"), (b"numpy._core", b"numpy.core")],
)
def test_module_names_of_older_versions(tmp_path: Path, old: tuple[bytes, bytes]) -> None:
    estimator, x = fitted("diag")
    content = pickle.dumps(estimator, protocol=2)  # names end with a newline there, not by their length
    path = tmp_path / "gmm.pkl"
    path.write_bytes(content.replace(*old))
    assert path.read_bytes() != content
    assert np.allclose(load_gmm(path).log_density(x), estimator.score_samples(x), rtol=1e-11, atol=0)


def test_arrays_of_any_order_and_layout(tmp_path: Path) -> None:
    estimator, x = fitted("full")
    expected = estimator.score_samples(x)
    estimator.means_ = np.asfortranarray(estimator.means_).astype(">f8")
    estimator.covariances_ = np.asfortranarray(estimator.covariances_)
    estimator.precisions_cholesky_ = estimator.precisions_cholesky_.transpose(2, 0, 1).copy().transpose(1, 2, 0)
    estimator.feature_names_in_ = np.array(["a", "b"], dtype=object)
    for protocol in (2, 5):
        gmm = load_gmm(dump(tmp_path / "gmm.pkl", estimator, protocol))
        assert np.allclose(gmm.log_density(x), expected, rtol=1e-11, atol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 4), d=st.integers(1, 4), covariance_type=st.sampled_from(TYPES))
def test_density_is_the_definition(seed: int, k: int, d: int, covariance_type: str) -> None:
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(k, d, d))
    full = roots @ roots.swapaxes(1, 2) + np.eye(d)
    covariances = {
        "full": full,
        "tied": full[0],
        "diag": np.diagonal(full, axis1=1, axis2=2),
        "spherical": full[:, 0, 0],
    }[covariance_type]
    each = {
        "full": list(full),
        "tied": [full[0]] * k,
        "diag": [np.diag(np.diag(c)) for c in full],
        "spherical": [c[0, 0] * np.eye(d) for c in full],
    }[covariance_type]
    weights, means, x = rng.dirichlet(np.ones(k)), rng.normal(size=(k, d)), rng.normal(size=(7, d))
    density = np.zeros(7)
    for w, m, c in zip(weights, means, each, strict=True):
        exponent = np.einsum("ni,ij,nj->n", x - m, np.linalg.inv(c), x - m)
        density += w * np.exp(-0.5 * exponent) / np.sqrt(np.linalg.det(2 * np.pi * c))
    gmm = mixture_of(weights, means, covariances, covariance_type, {})
    assert np.allclose(gmm.log_density(x), np.log(density), rtol=1e-8, atol=1e-8)


# ---- files that are not to be trusted ----


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks(trace: Path) -> dict[str, object]:
    code = f"open({str(trace)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {trace}"),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(io.open, str(trace), "w"),
        "path": Call(Path.touch, trace),
        "numpy": Call(np.savetxt, str(trace), [1.0]),
        "sklearn": Call(pytest.importorskip("sklearn.datasets").load_svmlight_file, str(trace)),
    }


@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "open", "path", "numpy", "sklearn"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "inside a mixture"])
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path: Path, name: str, protocol: int, hidden: bool) -> None:
    trace = tmp_path / "trace"
    content = attacks(trace)[name]
    if hidden:
        estimator, _ = fitted("diag")
        estimator.means_ = content
        content = estimator
    path = dump(tmp_path / "gmm.pkl", content, protocol)
    with pytest.raises(UserError, match=r"gmm\.pkl: refused") as caught:
        load_gmm(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_dotted_names_and_foreign_classes_of_sklearn_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "gmm.pkl"
    for module, name in (
        ("sklearn.mixture._gaussian_mixture", "os.system"),
        ("sklearn.mixture", "GaussianMixture.fit"),
        ("sklearn.mixture_evil", "GaussianMixture"),
        ("numpy", "load"),
        ("numpy.randomness", "x"),
        ("torch", "load"),
    ):
        short = [bytes([0x8C, len(text)]) + text.encode() for text in (module, name)]
        path.write_bytes(b"\x80\x04" + short[0] + short[1] + b"\x93.")
        with pytest.raises(UserError, match="refused"):
            load_gmm(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_truncated_pickles(tmp_path: Path, share: float) -> None:
    content = pickle.dumps(fitted("diag")[0])
    path = tmp_path / "gmm.pkl"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"gmm\.pkl: "):
        load_gmm(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_garbage_never_escapes_as_another_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(pickled())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("garbage") / "gmm.pkl"
    path.write_bytes(content)
    try:
        load_gmm(path)
    except UserError as error:
        assert str(path) in str(error)


@cache
def pickled() -> bytes:
    return pickle.dumps(fitted("diag")[0])


def test_other_files_are_named(tmp_path: Path) -> None:
    mixture = pytest.importorskip("sklearn.mixture")
    path = tmp_path / "gmm.pkl"
    with pytest.raises(UserError, match=r"gmm\.pkl"):
        load_gmm(path)
    path.write_bytes(b"<!DOCTYPE html><html>sign in</html>")
    with pytest.raises(UserError, match="a web page"):
        load_gmm(path)
    unfitted, other = mixture.GaussianMixture(3), mixture.BayesianGaussianMixture(n_components=3)
    for content in (np.random.default_rng(0).bytes(4000), *map(pickle.dumps, ({"gmm": 1}, unfitted, other))):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"gmm\.pkl: "):
            load_gmm(path)
    save_file({"weights": np.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"gmm\.pkl: .*means"):
        load_gmm(path)


def test_a_joblib_file_says_how_to_convert_it(tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib")
    joblib.dump(fitted("diag")[0], tmp_path / "gmm.joblib")
    with pytest.raises(UserError, match=r"pickle\.dump\(joblib\.load"):
        load_gmm(tmp_path / "gmm.joblib")


# ---- impossible mixtures ----


@pytest.mark.parametrize(
    "change",
    [
        {"weights": np.array([0.7, 0.7])},
        {"weights": np.array([1.5, -0.5])},
        {"means": np.full((2, 3), np.nan)},
        {"covariances": np.zeros((2, 3, 3))},
        {"covariances": np.full((2, 3, 3), np.nan)},
        {"covariances": -np.ones((2, 3)), "covariance_type": "diag"},
        {"covariances": np.array([1.0, 0.0]), "covariance_type": "spherical"},
        {"covariances": np.ones((2, 3))},
        {"covariance_type": "sphere"},
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    good = {"weights": np.full(2, 0.5), "means": np.zeros((2, 3)), "covariances": np.stack([np.eye(3)] * 2)}
    path = tmp_path / "gmm.safetensors"
    save_file(good, path, {"covariance_type": "full", "provenance": "{}"})
    load_gmm(path)
    arrays = good | {name: value for name, value in change.items() if isinstance(value, np.ndarray)}
    save_file(arrays, path, {"covariance_type": change.get("covariance_type", "full"), "provenance": "{}"})
    with pytest.raises(UserError, match=str(path)):
        load_gmm(path)


def test_features_of_another_network_are_refused() -> None:
    gmm = mixture_of(np.ones(1), np.zeros((1, 3)), np.ones(1), "spherical", {"network": "CLIP ViT-B/32"})
    with pytest.raises(UserError, match=r"3.*CLIP ViT-B/32"):
        gmm.log_density(np.zeros((2, 4)))


def test_a_component_without_weight_does_not_matter() -> None:
    one = mixture_of(np.ones(1), np.zeros((1, 3)), np.ones(1), "spherical", {})
    two = mixture_of(np.array([1.0, 0.0]), np.zeros((2, 3)), np.ones(2), "spherical", {})
    x = np.random.default_rng(0).normal(size=(5000, 3))
    assert np.allclose(one.log_density(x), two.log_density(x), rtol=1e-13)

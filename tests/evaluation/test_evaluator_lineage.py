"""Figures against guided-diffusion's evaluator, from given features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ldm.evaluation.frechet import frechet_distance, neighbours, statistics_of
from ldm.evaluation.inception import inception_score
from tests.lineage import facts, lineage


@pytest.fixture
def expected() -> dict[str, Any]:
    return facts("evaluator")


def features() -> tuple[np.ndarray, np.ndarray]:
    golden = lineage("evaluator")
    return golden["ref"].double().numpy(), golden["sample"].double().numpy()


def test_frechet_distance(expected: dict[str, Any]) -> None:
    reference, sample = features()
    real, few = statistics_of(reference), statistics_of(sample[: expected["few"]])
    assert frechet_distance(statistics_of(sample), real) == pytest.approx(expected["fid"], rel=1e-6)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    # singular: theirs adds 1e-6 to the diagonals if the root fails, and drops an imaginary part
    value = frechet_distance(few, real)
    assert value == pytest.approx(expected["fid_fewer_samples_than_dimensions"], rel=1e-5)


@pytest.mark.parametrize(("key", "k", "column"), [("k3", 3, 0), ("k1_5", 1, 0), ("k1_5", 5, 1)])
def test_precision_and_recall(expected: dict[str, Any], key: str, k: int, column: int) -> None:
    """Theirs computes distances in float16: of 260 and 300 items that lets one more in for k = 1, none for 3 and 5."""
    shares = [covered.mean() for covered in neighbours(*features(), k)]
    theirs = [expected[f"{key}/{figure}"][column] for figure in ("precision", "recall")]
    for share, figure, count in zip(shares, theirs, (260, 300), strict=True):
        assert share * count == pytest.approx(figure * count, abs=1e-9 + (k == 1))


def test_inception_score(expected: dict[str, Any]) -> None:
    logits = lineage("evaluator")["is/logits"].numpy()
    assert inception_score(logits, splits=1).value == pytest.approx(expected["is/split_5000"], rel=1e-6)
    parts = [inception_score(logits[i : i + 100], splits=1).value for i in range(0, 300, 100)]  # consecutive, as theirs
    assert np.mean(parts) == pytest.approx(expected["is/split_100"], rel=1e-6)

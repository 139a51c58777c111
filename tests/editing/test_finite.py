"""What is painted is finite, or the edit fails and says why: alone, in a table, in the benchmark, relit."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import inference
from ldm.checkpoint.io import read_checkpoint, write_safetensors
from ldm.editing.batch import Job, edit_many
from ldm.editing.editor import Editor, NotFiniteError, checked
from ldm.editing.request import make_request
from ldm.editing.settings import EditSettings
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.controlnet import Steering

SCENE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
MASK = Image.new("L", SCENE.size)
MASK.paste(255, (10, 10, 30, 30))
EXEMPLAR = Image.new("RGB", (20, 30), (220, 30, 40))


@pytest.fixture(scope="module")
def editor(tiny_folder: Path) -> Editor:
    return Editor.from_pretrained(tiny_folder)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for name, image in (("scene", SCENE), ("mask", MASK), ("exemplar", EXEMPLAR)):
        image.save(tmp_path / f"{name}.png")
    return {name: str(tmp_path / f"{name}.png") for name in ("scene", "mask", "exemplar")}


@pytest.fixture
def broken_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model with one NaN."""
    folder = tmp_path / "broken"
    folder.mkdir()
    state = read_checkpoint(tiny_folder / "model.safetensors")
    state["model.diffusion_model.out.2.weight"].view(-1)[0] = torch.nan
    write_safetensors(folder / "model.safetensors", state)
    shutil.copy(tiny_folder / "config.yaml", folder)
    return folder


def edit(model: LatentDiffusion, **options: Any) -> Any:
    return Editor(model).edit(SCENE, MASK, EXEMPLAR, num_steps=2, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.out.2.weight",
        "model.diffusion_model.time_embed.0.bias",
        "first_stage_model.decoder.conv_out.bias",
        "first_stage_model.encoder.conv_in.weight",
        "cond_stage_model.final_ln.weight",
        "proj_out.bias",
        "learnable_vector",
    ],
)
def test_the_weight_is_named(editor: Editor, name: str, value: float) -> None:
    model = deepcopy(editor.model)
    model.get_parameter(name).data.fill_(value)
    with pytest.raises(NotFiniteError, match=name.replace(".", r"\.")):
        edit(model)


def test_finite_weights_that_overflow(editor: Editor) -> None:
    """Inf, too: clamped to the model's range it would be white."""
    model = deepcopy(editor.model)
    model.get_parameter("first_stage_model.decoder.conv_out.weight").data.fill_(3e38)
    with pytest.raises(NotFiniteError, match="fp32 overflowed"):
        edit(model)


@pytest.mark.parametrize(
    ("dtype", "words"), [(torch.float16, "fp16 overflowed: use --precision bf16 or fp32"), (torch.bfloat16, "fp32")]
)
def test_the_precision_is_named(editor: Editor, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(NotFiniteError, match=words) as caught:
        checked(torch.tensor([0.0, torch.inf]).view(2, 1, 1, 1), deepcopy(editor.model).to(dtype))
    assert caught.value.is_finite == [True, False]


def test_the_control_network_is_named(editor: Editor) -> None:
    broken = nn.Linear(2, 2)
    broken.bias.data[0] = torch.nan
    steering = SimpleNamespace(controls=[SimpleNamespace(network=nn.Linear(1, 1)), SimpleNamespace(network=broken)])
    with pytest.raises(NotFiniteError, match="bias of the control network"):
        checked(torch.full((1, 3, 2, 2), torch.nan), editor.model, cast(Steering, steering))


def test_weights_are_read_only_when_something_is_wrong(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.editing.editor.first_not_finite", lambda _: pytest.fail("read all weights"))
    edit(editor.model)


def test_one_edit_writes_nothing(
    broken_folder: Path, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--image", files["scene"], "--mask", files["mask"], "--reference", files["exemplar"], "--steps", "2"]
    words += ["--checkpoint", str(broken_folder), "--device", "cpu", "--watermark", "--outdir", str(tmp_path / "out")]
    Image.new("RGB", (300, 300)).save(files["scene"])  # large enough for a mark
    Image.new("L", (300, 300), 255).save(files["mask"])
    assert inference.main(words) == 2
    assert "model.diffusion_model.out.2.weight" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").iterdir())


def test_rows_fail_each_for_itself(
    editor: Editor, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one batch, one image overflows."""
    decode = LatentDiffusion.decode_latents

    def overflowing(self: LatentDiffusion, z: Tensor, *known: Tensor) -> Tensor:
        pixels = decode(self, z, *known)
        pixels[1, 0, 0, 0] = torch.nan
        return pixels

    monkeypatch.setattr(LatentDiffusion, "decode_latents", overflowing)
    settings = EditSettings(num_steps=2)
    jobs = [Job(name, files["scene"], files["exemplar"], settings, mask=files["mask"]) for name in "abc"]
    report = edit_many(editor, jobs, tmp_path / "out", batch_size=3, metadata={})
    assert sorted(report.done) == ["a", "c"] and list(report.failed) == ["b"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["a.png", "c.png"]


def test_each_component_is_checked(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(SCENE, [EXEMPLAR], EditSettings(num_steps=2), boxes=[(2, 2, 8, 8), (30, 20, 40, 30)])
    shown, decode = [], LatentDiffusion.decode_latents

    def second_overflows(self: LatentDiffusion, z: Tensor, *known: Tensor) -> Tensor:
        shown.append(z)
        return decode(self, z, *known) * (1 if len(shown) < 2 else torch.nan)

    monkeypatch.setattr(LatentDiffusion, "decode_latents", second_overflows)
    with pytest.raises(NotFiniteError):
        editor.edit_request(request)
    assert len(shown) == 2

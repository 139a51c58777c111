from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from ldm.editing.editor import Editor, explained_out_of_memory, pick_precision
from ldm.editing.geometry import fit_scene
from ldm.editing.hole_masks import make_hole
from ldm.editing.request import make_request, prepare_exemplar
from ldm.editing.settings import EditSettings
from ldm.files import UserError
from ldm.images import MID_GREY
from ldm.latent_diffusion import DECODED_PIXELS

S = 32  # the model's image side


@pytest.fixture(scope="module")
def editor(tiny_folder: Path) -> Editor:
    return Editor.from_pretrained(tiny_folder)


def edit(editor: Editor, *images: Any, **options: Any) -> Any:
    """Edit in few steps."""
    return editor.edit(*images, **{"num_steps": 2} | options)


def spy(monkeypatch: pytest.MonkeyPatch, editor: Editor, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the list to which every call of a method of the model adds its arguments."""
    calls, method = [], getattr(editor.model, name)

    def recorded(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return method(*args, **options)

    monkeypatch.setattr(editor.model, name, recorded)
    return calls


def assert_equal_up_to_rounding(a: object, b: object) -> None:
    """The batch size may choose another kernel, whose float32 rounding can tip a pixel to the next grey level."""
    assert np.abs(pixels(a).astype(int) - pixels(b)).max() <= 1


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def pixels(image: object) -> np.ndarray:
    assert isinstance(image, Image.Image)
    return np.asarray(image)


RED = Image.new("RGB", (20, 30), (220, 30, 40))


@st.composite
def scenes(draw: st.DrawFn) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    width, height = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))), (width, height)


# ---- the edit ----


@settings(max_examples=15, deadline=None)
@given(drawn=scenes(), feather=st.integers(0, 5), whole=st.booleans())
def test_outside_the_hole_every_bit_is_the_scene(
    editor: Editor, drawn: tuple[tuple[int, int, int, int], tuple[int, int]], feather: int, whole: bool
) -> None:
    box, size = drawn
    scene, mask = photo(*size), box_mask(size, box)
    result = pixels(edit(editor, scene, mask, RED, feather=feather, whole_image=whole))
    outside = np.asarray(mask) == 0
    assert np.array_equal(result[outside], np.asarray(scene)[outside])


def test_the_hole_is_pasted_at_full_resolution() -> None:
    scene = photo(300, 200)
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, S, S)
    result = pixels(fit_scene(scene, box_mask(scene.size, (100, 50, 180, 130)), S).put_back(red, match_colors=False))
    assert result.shape == (200, 300, 3)
    assert (result[50:130, 100:180] == (255, 0, 0)).all()


def test_an_irregular_hole_is_kept_to_the_pixel(editor: Editor) -> None:
    scene = photo(90, 70)
    hole = np.random.default_rng(5).random((70, 90)) < 0.1
    result = pixels(edit(editor, scene, Image.fromarray(hole.astype(np.uint8) * 255), RED))
    assert np.array_equal(result[~hole], np.asarray(scene)[~hole])
    assert (result[hole] != np.asarray(scene)[hole]).any(-1).mean() > 0.9


def test_nothing_of_the_hole_reaches_the_model(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reflected borders included: the window is larger than the scene is high, and the hole touches the border.
    size, box = (200, 60), (80, 0, 120, 60)
    mask = box_mask(size, box)
    one, other = photo(*size), photo(*size)
    other.paste((255, 255, 255), box)
    calls = spy(monkeypatch, editor, "encode_image")
    for scene in (one, other):
        edit(editor, scene, mask, RED, whole_image=True)
    first, second = (args[0] for args, _ in calls)
    # What the resampling filter carries over the hole's edge (2 model pixels) is what may differ.
    keep_mask = fit_scene(one, mask, S, whole_image=True).keep_mask
    is_far = nn.functional.max_pool2d(1 - keep_mask, 5, 1, 2) == 0
    assert is_far.any()
    assert torch.equal(first * is_far, second * is_far)
    assert not (first * (1 - keep_mask)).any()


def test_feather_fades_linearly() -> None:
    scene = Image.new("RGB", (64, 64), (0, 0, 0))
    fitted = fit_scene(scene, box_mask(scene.size, (24, 24, 40, 40)), S)
    fade = fitted.put_back(torch.ones(3, S, S), feather=3, match_colors=False)
    assert pixels(fade)[32, 22:29, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_colours_agree_at_the_edge() -> None:
    """A decoder that makes everything darker: what is pasted back shows no darker patch."""
    scene = photo(96, 64)
    fitted = fit_scene(scene, box_mask(scene.size, (30, 20, 60, 44)), S)
    as_it_is, corrected = (
        pixels(fitted.put_back(fitted.image[0] - 0.2, match_colors=agreement)).astype(int)
        for agreement in (False, True)
    )
    inside = np.s_[24:40, 34:56]
    assert np.abs(as_it_is - np.asarray(scene))[inside].mean() > 20
    # what is left is the enlarging of the model's picture
    unchanged = pixels(fitted.put_back(fitted.image[0], match_colors=False)).astype(int)
    assert np.abs(corrected - unchanged)[inside].max() <= 1


# ---- several holes, and exemplars cut out ----


BOXES = ((10, 10, 40, 40), (140, 70, 180, 110))


def test_each_part_of_a_hole_is_an_edit_of_its_own(editor: Editor) -> None:
    scene, blue = photo(200, 120), Image.new("RGB", (9, 9), (20, 30, 220))
    first, second = (box_mask(scene.size, box) for box in BOXES)
    mask = Image.composite(first, second, first)
    result = edit(editor, scene, mask, [RED, blue])
    assert np.array_equal(pixels(result), pixels(edit(editor, edit(editor, scene, first, RED), second, blue)))
    several = edit(editor, scene, mask, [RED], n_samples=2)
    assert isinstance(several, list) and len(several) == 2
    with pytest.raises(UserError, match=r"3 .* 2"):
        edit(editor, scene, mask, [RED, RED, RED])


def test_candidates_of_separate_parts_are_those_made_alone(editor: Editor) -> None:
    scene, mask = photo(200, 120), box_mask((200, 120), BOXES[0])
    mask.paste(255, BOXES[1])
    both = edit(editor, scene, mask, RED, separate=True, seed=[5, 8])
    for image, seed in zip(both, (5, 8), strict=True):
        assert_equal_up_to_rounding(image, edit(editor, scene, mask, RED, separate=True, seed=seed))
    assert not np.array_equal(pixels(both[0]), pixels(both[1]))
    assert not np.array_equal(pixels(both[0]), pixels(edit(editor, scene, mask, RED, seed=5)))


def test_nothing_is_left_of_transparency(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eraser with a soft edge: neither the grey that stands for nothing nor what was half erased remains."""
    red = torch.tensor([220, 30, 40])[:, None, None] / 127.5 - 1

    def paint(image: Tensor, *_: object, **__: object) -> Tensor:
        return red.expand_as(image)

    monkeypatch.setattr(editor, "paint", paint)
    scene = Image.new("RGB", (96, 64), (220, 30, 40))
    alpha = Image.new("L", scene.size, 255)
    alpha.paste(100, (28, 18, 62, 46))
    alpha.paste(0, (30, 20, 60, 44))
    scene.putalpha(alpha)
    scene.paste((0, 255, 0, 90), (70, 10, 80, 20))
    hole = make_hole(scene)
    assert hole.getpixel((28, 18)) == 255 and hole.getpixel((75, 15)) == 255
    for per_component in (False, True):
        result = pixels(edit(editor, scene, hole, RED, feather=6, per_component=per_component))
        assert np.abs(result.astype(int) - (220, 30, 40)).max() <= 1  # with grey the edge would be 80 away


def test_exemplars_are_cut_out() -> None:
    picture = Image.new("RGB", (40, 20), (0, 200, 0))
    picture.paste((200, 0, 0), (10, 5, 30, 15))
    mask = box_mask((40, 20), (10, 5, 30, 15))
    mask.paste(0, (10, 5, 12, 7))  # a corner that is not part of the object
    kept = prepare_exemplar(picture, mask)
    assert kept.size == (20, 10) and kept.getpixel((0, 0)) == (200, 0, 0)
    grey = prepare_exemplar(picture, mask, background="grey")
    assert grey.getpixel((0, 0)) == MID_GREY and grey.getpixel((10, 5)) == (200, 0, 0)
    padded = prepare_exemplar(picture, mask, fit="pad")
    assert padded.size == (20, 20) and padded.getpixel((10, 0)) == MID_GREY and padded.getpixel((10, 10)) == (200, 0, 0)
    picture.putalpha(mask)
    assert prepare_exemplar(picture).size == (20, 10)
    assert prepare_exemplar(Image.new("RGB", (7, 5))).size == (7, 5)
    with pytest.raises(UserError, match="40 x 40, the exemplar 70 x 50"):
        prepare_exemplar(Image.new("RGB", (70, 50)), Image.new("L", (40, 40), 255))
    with pytest.warns(UserWarning, match="exemplar"):
        assert prepare_exemplar(picture, mask.resize((80, 40))).size == (20, 10)
    picture.putalpha(100)
    with pytest.raises(UserError, match="transparent"):
        prepare_exemplar(picture)


def test_what_is_transparent_of_an_exemplar_is_not_shown(editor: Editor) -> None:
    """A red square on green: alone it is shown when the green is transparent, and not when it is opaque."""
    picture = Image.new("RGB", (40, 20), (0, 200, 0))
    picture.paste((200, 0, 0), (10, 5, 30, 15))
    cut_out = picture.copy()
    cut_out.putalpha(box_mask((40, 20), (10, 5, 30, 15)))
    scene, mask = photo(40, 40), box_mask((40, 40), (8, 8, 20, 20))
    red, alone, whole = (
        pixels(edit(editor, scene, mask, exemplar))
        for exemplar in (Image.new("RGB", (20, 10), (200, 0, 0)), cut_out, picture)
    )
    assert np.array_equal(alone, red) and not np.array_equal(whole, red)


# ---- seeds ----


def test_equal_seeds_give_equal_images_in_every_batch(editor: Editor) -> None:
    scene, mask = photo(64, 64), box_mask((64, 64), (20, 20, 44, 44))
    three = edit(editor, scene, mask, RED, seed=7, n_samples=3)
    for image, seed in zip(three, (7, 8, 9), strict=True):
        assert_equal_up_to_rounding(image, edit(editor, scene, mask, RED, seed=seed))
    assert not np.array_equal(pixels(three[0]), pixels(three[1]))
    for image, other in zip(edit(editor, scene, mask, RED, seed=[9, 7]), (three[2], three[0]), strict=True):
        assert_equal_up_to_rounding(image, other)


def test_sampling_options_reach_the_model(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_step(*_: object) -> None: ...

    options: dict[str, Any] = {"sampler": "ddim", "num_steps": 7, "guidance_scale": 2.5, "eta": 0.5, "on_step": on_step}
    calls = spy(monkeypatch, editor, "sample")
    editor.edit(photo(40, 40), box_mask((40, 40), (8, 8, 20, 20)), None, **options)
    assert calls[0][1].items() >= options.items()


def test_the_model_says_how_much_context_it_wants(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    def share_of_hole(**options: float) -> float:
        fitted = editor.fit(photo(90, 90), box_mask((90, 90), (30, 30, 60, 60)), EditSettings(**options))  # pyright: ignore[reportArgumentType]
        return 1 - float(fitted.keep_mask.mean())

    wide = share_of_hole()
    assert wide == share_of_hole(crop_margin=0.5)
    monkeypatch.setattr(editor.model, "config", replace(editor.model.config, crop_margin=0.1))
    near = share_of_hole()
    assert near == share_of_hole(crop_margin=0.1) > 2 * wide


# ---- what people bring ----


def test_files_and_modes(editor: Editor, tmp_path: Path) -> None:
    scene, mask = photo(50, 40), box_mask((50, 40), (10, 10, 30, 30))
    expected = pixels(edit(editor, scene, mask, RED))
    scene.save(tmp_path / "scene.png")
    mask.convert("1").save(tmp_path / "mask.png")
    RED.save(tmp_path / "exemplar.png")
    from_files = edit(editor, tmp_path / "scene.png", str(tmp_path / "mask.png"), tmp_path / "exemplar.png")
    assert np.array_equal(pixels(from_files), expected)
    rgba = scene.copy()
    rgba.putalpha(255)
    assert np.array_equal(pixels(edit(editor, rgba, mask.convert("RGBA"), RED.quantize(4))), expected)
    deep = Image.fromarray(np.full((40, 50), 40000, np.uint16))
    grey = pixels(edit(editor, deep, mask, RED))
    assert grey[0, 0].tolist() == [156] * 3  # 40000 / 257 = 155.6
    for mode in ("L", "LA", "CMYK"):
        assert pixels(edit(editor, scene.convert(mode), mask, RED)).shape == (40, 50, 3)


def test_exif_orientation_is_applied_to_files_and_pictures(editor: Editor, tmp_path: Path) -> None:
    scene = photo(50, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    scene.save(tmp_path / "turned.png", exif=exif)
    upright = scene.transpose(Image.Transpose.ROTATE_270)
    mask = box_mask((40, 50), (5, 5, 15, 15))
    for turned in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        result = pixels(edit(editor, turned, mask, RED))
        assert np.array_equal(result[20:], np.asarray(upright)[20:])


def test_mask_of_another_size_warns(editor: Editor) -> None:
    scene = photo(80, 60)
    with pytest.warns(UserWarning, match=r"\(40, 30\).*\(80, 60\)"):
        result = pixels(edit(editor, scene, box_mask((40, 30), (10, 10, 20, 20)), RED))
    outside = np.ones((60, 80), bool)
    outside[20:40, 20:40] = False
    assert np.array_equal(result[outside], np.asarray(scene)[outside])
    assert not np.array_equal(result[~outside], np.asarray(scene)[~outside])


def test_a_mask_that_ignores_the_rotation_of_a_photo(tmp_path: Path) -> None:
    """Stored lying, seen upright; the mask was drawn on the pixels as stored, in their size or smaller."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(96, 64).save(tmp_path / "photo.jpg", exif=exif)
    for scene in (tmp_path / "photo.jpg", Image.open(tmp_path / "photo.jpg"), (tmp_path / "photo.jpg").read_bytes()):
        for size in ((96, 64), (48, 32), (47, 32)):
            with pytest.raises(UserError, match=r"\d+ x \d+, the scene 64 x 96; .* EXIF"):
                make_request(scene, RED, mask=box_mask(size, (8, 8, 40, 24)))
        with pytest.raises(UserError, match=r"150 x 50, the scene 64 x 96; (?!.*EXIF)"):
            make_request(scene, RED, mask=box_mask((150, 50), (8, 8, 40, 24)))
    box_mask((96, 64), (8, 8, 40, 24)).save(tmp_path / "mask.jpg", exif=exif)  # turned as the photo is
    hole = make_request(tmp_path / "photo.jpg", RED, mask=tmp_path / "mask.jpg").hole
    assert hole.size == (64, 96) and hole.getbbox() == (40, 8, 56, 40)


def test_arrays_and_tensors_are_edited_as_images(editor: Editor) -> None:
    scene, mask, exemplar = photo(50, 40), box_mask((50, 40), (10, 10, 30, 30)), photo(20, 30, seed=1)
    expected, array = pixels(edit(editor, scene, mask, exemplar)), np.asarray(exemplar)
    chw = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for a in (array, chw, chw / 255):
        assert np.array_equal(pixels(edit(editor, scene, np.asarray(mask) > 0, a)), expected)
    for hole in (np.asarray(mask), np.asarray(mask) // 255, np.asarray(mask) / 255, torch.tensor(np.asarray(mask) > 0)):
        for shape in (hole.shape, (1, *hole.shape) if isinstance(hole, torch.Tensor) else (*hole.shape, 1)):
            result = edit(editor, np.asarray(scene), hole.reshape(shape), (exemplar,))
            assert np.array_equal(pixels(result), pixels(edit(editor, scene, mask, [exemplar])))
    for arguments, words in (
        ((None, mask, RED), "the scene: got NoneType"),
        ((scene, mask, {}), "the exemplar: got dict"),
    ):
        with pytest.raises(UserError, match=words):
            edit(editor, *arguments)


def test_mask_levels(editor: Editor) -> None:
    scene = photo(40, 40)
    mask = Image.new("L", (40, 40), 127)  # kept, as in the original
    mask.paste(128, (10, 10, 20, 20))  # painted
    result = pixels(edit(editor, scene, mask, RED))
    changed = (result != np.asarray(scene)).any(-1)
    assert changed[10:20, 10:20].mean() > 0.9
    assert not changed.sum() - changed[10:20, 10:20].sum()


def test_full_tiny_and_empty_masks(editor: Editor) -> None:
    scene = photo(70, 50)
    assert pixels(edit(editor, scene, Image.new("L", scene.size, 255), RED)).shape == (50, 70, 3)
    result = pixels(edit(editor, scene, box_mask(scene.size, (69, 49, 70, 50)), RED))
    assert (result != np.asarray(scene)).any(-1).sum() == 1
    with pytest.raises(UserError, match="127"):
        edit(editor, scene, Image.new("L", scene.size, 127), RED)


def test_smallest_pictures(editor: Editor) -> None:
    dot = Image.new("RGB", (1, 1), (220, 30, 40))
    assert pixels(edit(editor, dot, Image.new("L", (1, 1), 255), dot)).shape == (1, 1, 3)
    assert pixels(edit(editor, photo(1, 90), box_mask((1, 90), (0, 30, 1, 60)), dot)).shape == (90, 1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 0}, "n_samples"),
        ({"feather": -1}, "feather"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_settings_out_of_range(editor: Editor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        edit(editor, photo(40, 40), box_mask((40, 40), (8, 8, 20, 20)), RED, **options)


# ---- models ----


def test_float16_on_the_cpu_is_refused(editor: Editor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float16"):
        Editor(deepcopy(editor.model).half())
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="float16"):
        Editor.from_pretrained(tmp_path, dtype=torch.float16)


def test_missing_models_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        Editor.from_pretrained(tmp_path / "model.ckpt", config="configs/v1.yaml")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"config\.yaml"):
        Editor.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model_index.json")
    with pytest.raises(UserError, match=r"scripts/convert_checkpoint\.py"):
        Editor.from_pretrained(tmp_path)
    monkeypatch.setattr("ldm.editing.editor.BUNDLED_MODEL", tmp_path / "mini")
    with pytest.raises(UserError, match="mini"):
        Editor.from_pretrained()


def test_device_names() -> None:
    from ldm.editing.editor import pick_device

    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="xpu"):
        pick_device("xpu")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cpu", {"auto": "fp32", "full": "fp32", "autocast": "fp32", "fp16": "fp16"}),
        ("mps", {"auto": "fp32", "autocast": "fp32", "bf16": "bf16"}),
        ("cuda 7.5", {"auto": "fp16", "full": "fp32", "autocast": "fp16", "bf16": "bf16"}),
        ("cuda 8.0", {"auto": "bf16", "full": "fp32", "autocast": "fp16", "fp32": "fp32"}),
    ],
)
def test_precisions(device: str, words: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, capability = device.partition(" ")
    pair = tuple(int(digit) for digit in capability.split(".") if digit)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: pair)
    assert {word: pick_precision(word, torch.device(name)) for word in words} == words


def test_bf16_needs_a_cpu_that_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for name in ("avx512_bf16", "amx_bf16", "bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"avx2": True, name: True})
        assert pick_precision("bf16", cpu) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    with pytest.raises(UserError, match="fp32"):
        pick_precision("bf16", cpu)


def test_phases(editor: Editor) -> None:
    """Two components, one after the other; every step is a step of painting."""
    scene, mask, seen = photo(200, 120), box_mask((200, 120), BOXES[0]), list[str]()
    mask.paste(255, BOXES[1])
    options = {"on_phase": seen.append, "on_step": lambda *_: seen.append("step"), "per_component": True}
    edit(editor, scene, mask, RED, **options)
    assert seen == 2 * ["encoding", "painting", "step", "step", "decoding"]


# ---- nothing is done twice ----


@contextmanager
def batch_sizes(editor: Editor) -> Iterator[dict[str, list[int]]]:
    """Collect the batch sizes of every pass through the first stage's halves and the exemplar's tower."""
    model, sizes = editor.model, dict[str, list[int]]()
    first_stage = model.first_stage_model
    parts = {
        "encoder": first_stage.encoder,
        "exemplar": model.cond_stage_model.transformer,
        "decoder": first_stage.decoder,
    }
    with ExitStack() as stack:
        for name, part in parts.items():
            sizes[name] = []

            def hook(_module: nn.Module, _args: Any, _kwargs: Any, result: Any, name: str = name) -> None:
                sizes[name].append(len(result if isinstance(result, Tensor) else result[0]))

            handle = part.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield sizes


def test_equal_images_and_exemplars_are_encoded_once(editor: Editor, tmp_path: Path) -> None:
    """Several samples, and rows of a table, with the results that each has alone."""
    scene, mask = photo(64, 64), box_mask((64, 64), (20, 20, 44, 44))
    with batch_sizes(editor) as sizes:
        three = edit(editor, scene, mask, RED, seed=[5, 9, 7])
    assert sizes == {"encoder": [1], "exemplar": [1], "decoder": [3]}
    for image, seed in zip(three, (5, 9, 7), strict=True):
        assert_equal_up_to_rounding(image, edit(editor, scene, mask, RED, seed=seed))


def test_rounds_encode_once(editor: Editor) -> None:
    request = make_request(
        photo(64, 64), RED, EditSettings(n_samples=5, num_steps=2), mask=box_mask((64, 64), (20, 20, 44, 44))
    )
    with batch_sizes(editor) as sizes:
        results = editor.edit_request(request, batch_size=2)
    assert sizes == {"encoder": [1], "exemplar": [1], "decoder": [2, 2, 1]}
    for image, other in zip(results, editor.edit_request(request), strict=True):
        assert_equal_up_to_rounding(image, other)


def test_large_images_are_decoded_one_at_a_time(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, mask = photo(64, 64), box_mask((64, 64), (20, 20, 44, 44))
    together = edit(editor, scene, mask, RED, n_samples=3)
    monkeypatch.setitem(DECODED_PIXELS, "cpu", 2 * S * S - 1)
    with batch_sizes(editor) as sizes:
        alone = edit(editor, scene, mask, RED, n_samples=3)
    assert sizes["decoder"] == [1, 1, 1]
    for image, other in zip(alone, together, strict=True):
        assert_equal_up_to_rounding(image, other)


@pytest.mark.parametrize(
    ("error", "is_explained"),
    [
        (torch.OutOfMemoryError(), True),
        (MemoryError(), True),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000000000000 bytes."),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_memory_errors_are_told_from_others(error: Exception, is_explained: bool) -> None:
    with pytest.raises(UserError if is_explained else type(error)), explained_out_of_memory("fewer samples"):
        raise error

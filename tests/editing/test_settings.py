"""The list of settings: checks, conversions, and what is generated from it."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.editing.hole_masks import apply_shape
from ldm.editing.settings import (
    DEFAULT_STEPS,
    KINDS,
    OPTIONS,
    EditSettings,
    add_options,
    check_setting,
    given_options,
    json_schema,
    settings_from,
)
from ldm.files import UserError
from ldm.samplers import SAMPLERS

OTHER: dict[str, Any] = {
    "prompt": "-a dog",
    "negative_prompt": "a cat",
    "n_samples": 3,
    "seed": (4, 5, 6),
    "sampler": "ddim",
    "num_steps": 7,
    "guidance_scale": 3.5,
    "guidance_interval": (0.25, 0.75),
    "guidance_rescale": 0.7,
    "eta": 0.5,
    "dilate": 2,
    "mask_shape": "box",
    "per_component": True,
    "crop_margin": 0.25,
    "whole_image": True,
    "feather": 3,
    "match_colors": False,
    "paste_back": False,
    "reference_background": "grey",
    "reference_fit": "pad",
}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(allow_abbrev=False)
    add_options(result, *OPTIONS)
    return result


def test_the_samplers_are_those_of_the_model() -> None:
    assert set(DEFAULT_STEPS) == set(SAMPLERS)


def test_the_command_line_repeats_any_settings() -> None:
    settings = EditSettings(**OTHER)
    assert settings.changed() == OTHER
    assert given_options(parser().parse_args([])) == {}
    assert EditSettings(**given_options(parser().parse_args(settings.cli_words()))) == settings
    assert EditSettings().cli_words() == []


def test_text_and_records_repeat_any_settings() -> None:
    settings = EditSettings(**OTHER)
    cells = {name: " ".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in OTHER.items()}
    assert settings_from(cells) == settings
    assert EditSettings(**settings.record()) == settings
    assert settings_from({name: "" for name in OTHER if name not in ("prompt", "negative_prompt")} | {
        "sampler": "ddim", "mask_shape": "given", "reference_background": "keep", "reference_fit": "squash"
    }, EditSettings(**OTHER)).feather is None  # fmt: skip


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--grow 3", "dilate", 3),
        ("--shape box", "mask_shape", "box"),
        ("--separate", "per_component", True),
        ("--context-margin 0.2", "crop_margin", 0.2),
        ("--no-colour-agreement", "match_colors", False),
        ("--scale 2", "guidance_scale", 2.0),
        ("--ddim_eta 0.5", "eta", 0.5),
        ("--n_samples 2", "n_samples", 2),
        ("--seed 5", "seed", 5),
    ],
)
def test_old_and_original_spellings(words: str, name: str, value: Any) -> None:
    assert given_options(parser().parse_args(words.split())) == {name: value}


@pytest.mark.parametrize(
    ("column", "text", "name", "value"),
    [
        ("grow", "3", "dilate", 3),
        ("shape", "box", "mask_shape", "box"),
        ("separate", "Yes", "per_component", True),
        ("context_margin", "1", "crop_margin", 1.0),
        ("colour_agreement", "no", "match_colors", False),
        ("scale", "2", "guidance_scale", 2.0),
        ("guidance_interval", "0.2, 0.8", "guidance_interval", (0.2, 0.8)),
    ],
)
def test_columns_of_tables(column: str, text: str, name: str, value: Any) -> None:
    assert settings_from({column: text}) == EditSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_samples", 0),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", 10**400),
        ("seed", 1.5),
        ("seed", float("nan")),
        ("seed", True),
        ("seed", ()),
        ("seed", "1"),
        ("sampler", "euler"),
        ("num_steps", 0),
        ("num_steps", 2.5),
        ("num_steps", 10**9),
        ("n_samples", 10**9),
        ("guidance_scale", float("inf")),
        ("guidance_scale", 1e308),
        ("guidance_interval", (0.5, 0.2)),
        ("guidance_interval", (0.5, 1.2)),
        ("guidance_interval", (0.5,)),
        ("guidance_interval", 0.5),
        ("guidance_rescale", 1.5),
        ("eta", 0.5),  # the default sampler has none
        ("dilate", -1),
        ("mask_shape", "round"),
        ("crop_margin", float("nan")),
        ("crop_margin", 1e308),
        ("dilate", 2**63),
        ("feather", -1),
        ("feather", True),
        ("match_colors", 1),
        ("prompt", 3),
    ],
)
def test_wrong_values_name_the_setting(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{name}: got "):
        EditSettings(**{name: value})


@pytest.mark.parametrize(("name", "text"), [("match_colors", "perhaps"), ("num_steps", "x"), ("feather", "1 2")])
def test_text_that_is_no_value(name: str, text: str) -> None:
    with pytest.raises(UserError, match=f"^{name}: got "):
        settings_from({name: text})


def test_unknown_settings_are_named() -> None:
    with pytest.raises(UserError, match="strength"):
        settings_from({"strength": 3})
    with pytest.raises(UserError, match="num_steps"):
        settings_from({"steps": 3, "num_steps": 4})


def test_seeds() -> None:
    assert EditSettings(seed=np.int64(3), n_samples=2).seeds == [3, 4]
    assert EditSettings(seed=[7, 2]).seeds == [7, 2]
    assert EditSettings().is_single
    assert not EditSettings(seed=[7]).is_single
    with pytest.raises(UserError, match="seed"):
        EditSettings(seed=[1, 2], n_samples=3)
    with pytest.raises(UserError, match="seed"):
        EditSettings(seed=2**64 - 1, n_samples=2)


@given(st.integers(-(2**63), 2**64 - 1))
def test_a_seed_is_any_integer_of_64_bits_everywhere(seed: int) -> None:
    expected = EditSettings(seed=seed)
    words = parser().parse_args(expected.cli_words())
    assert EditSettings(**given_options(words)) == settings_from({"seed": str(seed)}) == expected
    schema = json_schema("seed")
    assert schema["minimum"] <= seed <= schema["maximum"]
    hole = Image.new("L", (12, 12))
    hole.paste(255, (3, 3, 8, 9))
    assert apply_shape(hole, "arbitrary", seed) == apply_shape(hole, "arbitrary", seed % 2**64)
    draws = [torch.Generator().manual_seed(number).initial_seed() for number in (seed, seed % 2**64)]
    assert draws[0] == draws[1]


@given(st.sampled_from([name for name, kind in KINDS.items() if kind in (int, float)]), st.floats() | st.integers())
def test_numbers_are_within_their_bounds_or_refused(name: str, number: float) -> None:
    pair = (number, number) if OPTIONS[name].nargs == 2 else number
    try:
        checked = check_setting(name, pair)
    except UserError as error:
        assert str(error).startswith(f"{name}: got ")
    else:
        assert pair == checked and math.isfinite(number) and OPTIONS[name].low <= number <= OPTIONS[name].high


def test_steps_follow_the_sampler() -> None:
    assert [EditSettings(sampler=name).steps for name in ("dpm_solver_pp", "ddpm")] == [20, 250]
    assert EditSettings(sampler="ddpm", num_steps=3).steps == 3


def test_schemas_hold_the_defaults() -> None:
    assert json_schema("sampler")["enum"] == list(DEFAULT_STEPS)
    assert json_schema("feather")["minimum"] == 0
    assert {json_schema(name)["type"] for name in OPTIONS} == {"string", "integer", "number", "boolean"}

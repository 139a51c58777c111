"""The settings of an edit: the one list behind Python, command lines, job tables, web page, benchmark and metadata.

Each field of `EditSettings` carries an `Option` with its bounds, its command-line spellings and its help text.
Everything else is generated: argparse options, the conversion of table cells, JSON schemas, the call as text.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, get_args, get_origin, get_type_hints

from ldm.files import UserError

# Samplers and the number of steps each takes by default.
DEFAULT_STEPS = {"dpm_solver_pp": 20, "plms": 50, "ddim": 50, "unipc": 20, "ddpm": 250}
MASK_SHAPES = ("given", "box", "arbitrary")
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_STEPS = ", ".join(f"{sampler} {steps}" for sampler, steps in DEFAULT_STEPS.items())


@dataclass(frozen=True)
class Option:
    """How a setting is spelled, bounded and explained.

    Attributes:
        flags: command-line spellings, the preferred one first; further ones are those of the original or of old.
        help: one phrase, without the default.
        columns: further names of the setting in job tables.
        choices: the allowed words of a string.
        low, high: inclusive bounds of a number.
        default_text: the default in words, where it is computed.
        metavar: placeholder of the value in the command line's help.
        label: of the control on the web page; settings without a label are not offered there.
        slider: (low, high, step) of that control, within the bounds; a step of 0 asks for a number field.
    """

    flags: tuple[str, ...]
    help: str
    columns: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    default_text: str = ""
    metavar: str | tuple[str, ...] | None = None
    label: str = ""
    slider: tuple[float, float, float] = (0, 0, 0)


def _setting(default: Any, flags: str, help: str, **option: Any) -> Any:
    return field(default=default, metadata={"option": Option(tuple(flags.split()), help, **option)})


@dataclass(frozen=True)
class EditSettings:
    """Every setting of an edit, checked.

    Values are normalised: lists become tuples, numpy's numbers Python's own.

    Raises:
        UserError: a value has another type, is out of bounds, or does not go with another one.
    """

    prompt: str | None = _setting(
        None, "--prompt", "what to paint, in words", metavar="TEXT", default_text="none", label="Prompt"
    )
    negative_prompt: str | None = _setting(
        None,
        "--negative-prompt",
        "what to avoid, in words",
        metavar="TEXT",
        default_text="none",
        label="Negative prompt",
    )
    n_samples: int = _setting(
        1, "--n-samples --n_samples", "results to make", low=1, label="Candidates", slider=(1, 8, 1)
    )
    seed: int | tuple[int, ...] = _setting(
        0,
        "--seed",
        "sample i uses SEED + i, or the i-th of several seeds",
        label="Seed",
        slider=(0, 2**31 - 1, 0),
        low=-(2**63),
        high=2**63 - 1,
    )
    sampler: str = _setting("dpm_solver_pp", "--sampler", "solver", choices=tuple(DEFAULT_STEPS), label="Sampler")
    num_steps: int | None = _setting(
        None,
        "--steps --num-steps",
        "more is slower and finer",
        low=1,
        default_text=_STEPS,
        label="Steps",
        slider=(1, 250, 1),
    )
    guidance_scale: float = _setting(
        5.0,
        "--guidance-scale --scale",
        "1 is without guidance; the paper uses 5, the original's script 1",
        label="Guidance scale",
        slider=(1, 15, 0.5),
    )
    guidance_interval: tuple[float, float] = _setting(
        (0.0, 1.0),
        "--guidance-interval",
        "noise levels with guidance, from 0, data, to 1, noise",
        low=0,
        high=1,
        metavar=("LOW", "HIGH"),
    )
    eta: float = _setting(0.0, "--eta --ddim_eta", "stochasticity of the sampler ddim", low=0, high=1)
    dilate: int = _setting(0, "--dilate --grow", "pixels to widen the hole by", columns=("grow",), low=0, metavar="PX")
    mask_shape: str = _setting(
        "given",
        "--mask-shape --shape",
        "replace each component of the hole by its box, or by a shape as in training",
        columns=("shape",),
        choices=MASK_SHAPES,
    )
    per_component: bool = _setting(
        False,
        "--per-component --separate",
        "edit the hole's connected components one by one, each with its own crop",
        columns=("separate",),
        label="Per component",
    )
    crop_margin: float | None = _setting(
        None,
        "--crop-margin --context-margin",
        "surroundings shown on each side, as a share of the hole's longer side",
        columns=("context_margin",),
        low=0,
        default_text="the model's",
        label="Crop margin",
        slider=(0, 4, 0.05),
    )
    whole_image: bool = _setting(False, "--whole-image", "show the whole scene, as the paper does", label="Whole image")
    feather: int | None = _setting(
        None,
        "--feather",
        "pixels over which the hole's edge fades",
        low=0,
        metavar="PX",
        label="Feather",
        slider=(-1, 64, 1),
        default_text="a fiftieth of the hole's longer side",
    )
    match_colors: bool = _setting(
        True,
        "--match-colors --colour-agreement",
        "correct the decoder's colour error along the hole's edge",
        columns=("colour_agreement",),
        label="Match colors",
    )
    paste_back: bool = _setting(
        True, "--paste-back", "keep the scene's own pixels outside the hole, not the decoder's rendering of them"
    )
    reference_background: str = _setting(
        "keep",
        "--reference-background",
        "background of the exemplar's object",
        choices=("keep", "grey"),
        label="Exemplar's background",
    )
    reference_fit: str = _setting(
        "squash",
        "--reference-fit",
        "to the encoder's square; the paper squashes",
        choices=("squash", "pad"),
        label="Exemplar's fit",
    )

    def __post_init__(self) -> None:
        for name in OPTIONS:
            object.__setattr__(self, name, check_setting(name, getattr(self, name)))
        if isinstance(self.seed, tuple) and (not self.seed or self.n_samples not in (1, len(self.seed))):
            raise UserError(f"seed: got {len(self.seed)} seeds for {self.n_samples} samples, expected one per sample")
        for seed in (self.seeds[0], self.seeds[-1]):
            check_setting("seed", seed)
        low, high = self.guidance_interval
        if low > high:
            raise UserError(f"guidance_interval: got {low:g} to {high:g}, expected 0 <= low <= high <= 1")
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta: got {self.eta:g} with the sampler {self.sampler}, expected 0; only ddim uses it")

    @property
    def steps(self) -> int:
        """The number of steps: `num_steps`, or the sampler's default."""
        return DEFAULT_STEPS[self.sampler] if self.num_steps is None else self.num_steps

    @property
    def seeds(self) -> list[int]:
        """The seed of each sample."""
        return list(self.seed) if isinstance(self.seed, tuple) else [self.seed + i for i in range(self.n_samples)]

    @property
    def is_single(self) -> bool:
        """Whether one result is asked for, not a list."""
        return self.n_samples == 1 and not isinstance(self.seed, tuple)

    @property
    def sampling(self) -> dict[str, Any]:
        """The keywords of `Editor.paint` that the samples of a batch share."""
        names = ("negative_prompt", "sampler", "guidance_scale", "guidance_interval", "eta")
        return {name: getattr(self, name) for name in names} | {"num_steps": self.steps}

    def record(self) -> dict[str, Any]:
        """Return all settings as JSON values, the number of steps resolved, for metadata."""
        values = {name: getattr(self, name) for name in OPTIONS} | {"num_steps": self.steps}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, which are the keywords that repeat the edit."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def cli_words(self) -> list[str]:
        """Return the command-line options of the changed settings."""
        words = []
        for name, value in self.changed().items():
            flag = OPTIONS[name].flags[0]
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, tuple):
                words += [flag, *map(str, value)]
            else:
                words.append(f"{flag}={value}")  # in one word: a prompt may begin with a hyphen
        return words


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in fields(EditSettings)}
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(EditSettings)}
_HINTS = get_type_hints(EditSettings)
COLUMNS = {column: name for name, option in OPTIONS.items() for column in (name, *option.columns)}


def kind(name: str) -> type:
    """Return the type of a setting's values: bool, int, float, str or tuple (guidance_interval)."""
    hint = _HINTS[name]
    if get_origin(hint) is tuple:
        return tuple
    return next((choice for choice in get_args(hint) if choice in (bool, int, float, str)), hint)


def check_setting(name: str, value: Any) -> Any:
    """Return a setting's value in its own type.

    Raises:
        UserError: another type, or out of bounds.
    """
    option = OPTIONS[name]
    if value is None and DEFAULTS[name] is None:
        return None
    if isinstance(value, (list, tuple)) and name in ("seed", "guidance_interval"):
        if name == "guidance_interval" and len(value) != 2:
            raise UserError(f"{name}: got {len(value)} numbers, expected two")
        return tuple(_check_number(name, option, one, int if name == "seed" else float) for one in value)
    expected = kind(name)
    if expected is bool:
        if isinstance(value, bool):
            return value
        raise UserError(f"{name}: got {value!r:.80}, expected true or false")
    if expected is str:
        if isinstance(value, str) and (not option.choices or value in option.choices):
            return value
        raise UserError(f"{name}: got {value!r:.80}, expected {_one_of(option.choices)}")
    if expected is tuple:
        raise UserError(f"{name}: got {value!r:.80}, expected two numbers")
    return _check_number(name, option, value, expected)


def _one_of(choices: Collection[str]) -> str:
    return f"one of {', '.join(choices)}" if choices else "a text"


def _check_number(name: str, option: Option, value: Any, expected: type) -> int | float:
    is_number = _is_finite(value)
    is_whole = is_number and value % 1 == 0
    if not (is_whole if expected is int else is_number) or not option.low <= value <= option.high:
        what = "a whole number" if expected is int else "a finite number"
        raise UserError(f"{name}: got {value!r:.80}, expected {what}{_bounds(option)}")
    return expected(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _bounds(option: Option) -> str:
    if option.high < math.inf:
        return f" from {option.low:g} to {option.high:g}"
    return f", {option.low:g} or more" if option.low > -math.inf else ""


def parse_setting(name: str, text: str) -> Any:
    """Return a setting's value from text, such as a table's cell; the empty text is the default.

    Raises:
        UserError: not a value of the setting.
    """
    expected = kind(name)
    if expected is str:
        return check_setting(name, text)
    if not text.strip():
        return DEFAULTS[name]
    try:
        if expected is bool:
            return BOOLEANS[text.strip().lower()]
        numbers = [int(word) if expected is int else float(word) for word in text.replace(",", " ").split()]
    except (KeyError, ValueError):
        raise UserError(f"{name}: got {text!r:.80}, expected {expected.__name__}") from None
    return check_setting(name, numbers[0] if len(numbers) == 1 else numbers)


def settings_from(values: Mapping[str, Any], base: EditSettings | None = None) -> EditSettings:
    """Return `base` with the given values, which may be text.

    Args:
        values: by name, or by another name that job tables allow.
        base: settings that `values` leaves out; None takes the defaults.

    Raises:
        UserError: an unknown name or a wrong value.
    """
    if unknown := sorted(values.keys() - COLUMNS.keys()):
        raise UserError(f"got the setting {unknown[0]}, expected one of {', '.join(OPTIONS)}")
    given = {
        COLUMNS[name]: parse_setting(COLUMNS[name], value) if isinstance(value, str) else value
        for name, value in values.items()
    }
    return EditSettings(**{**(vars(base) if base else {}), **given})


def add_options(parser: Any, *names: str, **helps: str) -> None:
    """Add the options of settings to an argparse parser or group.

    The namespace has an attribute for each setting that was given, and none for the others: see `given_options`.

    Args:
        names: the settings, in the order of the help.
        helps: other help texts, by setting.
    """
    for name in names:
        option, expected = OPTIONS[name], kind(name)
        default = option.default_text or DEFAULTS[name]
        common: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": helps.get(name) or f"{option.help}; default: {_shown(default)}",
        }
        if expected is bool:
            parser.add_argument(*option.flags, action=argparse.BooleanOptionalAction, **common)
        elif expected is str:
            # `choices or None`: argparse takes an empty tuple for "nothing is allowed".
            parser.add_argument(*option.flags, choices=option.choices or None, metavar=option.metavar, **common)
        else:
            nargs = {"seed": "+", "guidance_interval": 2}.get(name)
            parser.add_argument(
                *option.flags, type=_parser_of(name), nargs=nargs, metavar=option.metavar or "N", **common
            )


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(f"{value:g}" for value in default) if isinstance(default, tuple) else str(default)


def _parser_of(name: str) -> Any:
    option = OPTIONS[name]
    expected = int if kind(name) is int else float

    def parse(text: str) -> int | float:
        value = expected(text)  # argparse reports a ValueError by the function's name
        try:
            return _check_number(name, option, value, expected)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parse.__name__ = expected.__name__
    return parse


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given on a command line; a single seed is a number."""
    given = {name: value for name, value in vars(args).items() if name in OPTIONS}
    if isinstance(given.get("seed"), list) and len(given["seed"]) == 1:
        (given["seed"],) = given["seed"]
    return given


def json_schema(name: str) -> dict[str, Any]:
    """Return the JSON schema of a setting."""
    option, expected = OPTIONS[name], kind(name)
    if expected is tuple:
        numbers = {"type": "number", "minimum": option.low, "maximum": option.high}
        return {"type": "array", "items": numbers, "minItems": 2, "maxItems": 2, "description": option.help}
    types = {bool: "boolean", int: "integer", float: "number", str: "string"}
    schema: dict[str, Any] = {"type": types[expected], "description": option.help}
    if option.choices:
        schema["enum"] = list(option.choices)
    if option.low > -math.inf and expected in (int, float):
        schema["minimum"] = option.low
    if option.high < math.inf and expected in (int, float):
        schema["maximum"] = option.high
    return schema

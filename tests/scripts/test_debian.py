"""Material from Debian packages: Qt resource files, licence lists, choice of images."""

from __future__ import annotations

import struct
import subprocess
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.files import UserError
from scripts.scenes import debian
from scripts.scenes.debian import fetch_material, licence_of, read_copyright, read_rcc
from scripts.scenes.emoji import Emoji

Tree = dict[str, "bytes | Tree"]


def build_rcc(tree: Tree, *, version: int = 3, compressed: tuple[str, ...] = ()) -> bytes:
    """A Qt resource file as `rcc --binary` lays it out: nodes breadth first, names, data."""
    names, data, nodes = b"", b"", []
    level: list[tuple[str, bytes | Tree]] = [("", tree)]
    first_child = 1
    while level:
        following: list[tuple[str, bytes | Tree]] = []
        for name, content in level:
            name_offset = len(names)
            names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
            if isinstance(content, dict):
                node = struct.pack(">IHII", name_offset, 0x02, len(content), first_child)
                first_child += len(content)
                following += content.items()
            else:
                packed = struct.pack(">I", len(content)) + zlib.compress(content) if name in compressed else content
                node = struct.pack(">IHHHI", name_offset, int(name in compressed), 0, 1, len(data))
                data += struct.pack(">I", len(packed)) + packed
            nodes.append(node + (bytes(8) if version >= 2 else b""))
        level = following
    header_size = 24 if version >= 3 else 20
    body = b"".join(nodes)
    offsets = header_size, header_size + len(body), header_size + len(body) + len(data)
    header = b"qres" + struct.pack(">4I", version, *offsets) + bytes(header_size - 20)
    return header + body + data + names


TREE: Tree = {"images": {"cat.webp": b"raw cat", "größe.txt": b"z" * 500}, "top.txt": b"", "empty": {}}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_resource_file_is_listed_and_decompressed(tmp_path: Path, version: int) -> None:
    path = tmp_path / "x.rcc"
    path.write_bytes(build_rcc(TREE, version=version, compressed=("größe.txt",)))
    content = {file.path: file.read() for file in read_rcc(path)}
    assert content == {"/images/cat.webp": b"raw cat", "/images/größe.txt": b"z" * 500, "/top.txt": b""}


@given(cut=st.integers(min_value=4, max_value=len(build_rcc(TREE)) - 1))
def test_truncated_resource_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("rcc") / "x.rcc"
    path.write_bytes(build_rcc(TREE)[:cut])
    with pytest.raises(UserError, match=r"x\.rcc"):
        read_rcc(path)


@given(position=st.integers(min_value=4, max_value=len(build_rcc(TREE)) - 1), value=st.integers(0, 255))
def test_damaged_resource_file_ends(tmp_path_factory: pytest.TempPathFactory, position: int, value: int) -> None:
    """A flipped byte gives other content or a clear error, never an endless walk."""
    damaged = bytearray(build_rcc(TREE))
    damaged[position] = value
    path = tmp_path_factory.mktemp("rcc") / "x.rcc"
    path.write_bytes(damaged)
    try:
        read_rcc(path)
    except UserError as error:
        assert "x.rcc" in str(error)


def test_other_files_and_damaged_payloads_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.rcc"
    path.write_bytes(b"\x89PNG....")
    with pytest.raises(UserError, match="qres"):
        read_rcc(path)
    path.write_bytes(
        build_rcc({"a.txt": b"z" * 500}, compressed=("a.txt",)).replace(zlib.compress(b"z" * 500)[:4], b"\0\0\0\0")
    )
    with pytest.raises(UserError, match="zlib"):
        read_rcc(path)[0].read()


COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Source: https://example.org/pictures

Files: *
Copyright: 2014 Everyone
License: GPL-2+

Files: images/*.png
Copyright: 2016 Painter
License: GPL-3

Files: 16.04/bridge.jpg
 src/erase/resource/bee.jpg
Copyright: 2018, Someone <s@example.org>
           2019, Someone Else
License: CC-BY-4.0
Comment: https://example.org/bee

License: GPL-3
 This is a text.
"""


@pytest.mark.parametrize(
    ("path", "licence"),
    [
        ("usr/share/backgrounds/bridge.jpg", "CC-BY-4.0"),  # installed into another folder
        ("src/erase/resource/bee.webp", "CC-BY-4.0"),  # converted
        ("src/other/resource/bee.webp", "GPL-2+"),  # same name, another picture
        ("src/categories/images/bee.png", "GPL-2+"),  # a wildcard is anchored at the root
        ("images/tux.png", "GPL-3"),
    ],
)
def test_licence_is_that_of_the_last_matching_paragraph(path: str, licence: str) -> None:
    stanza = licence_of(path, read_copyright(COPYRIGHT))
    assert stanza is not None
    assert stanza.licence == licence


def test_copyright_holders_are_read_over_several_lines() -> None:
    stanza = read_copyright(COPYRIGHT)[-1]
    assert stanza.holders == "2018, Someone <s@example.org>, 2019, Someone Else"
    assert stanza.comment == "https://example.org/bee"


def picture(size: tuple[int, int], suffix: str = "JPEG") -> bytes:
    content = BytesIO()
    Image.new("RGB", size, "teal").save(content, suffix)
    return content.getvalue()


def glyph(colour: tuple[int, int, int]) -> bytes:
    content, image = BytesIO(), Image.new("RGBA", (32, 32))
    image.paste((*colour, 255), (4, 4, 28, 28))
    image.save(content, "PNG")
    return content.getvalue()


def test_material_is_copied_from_unpacked_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stamps = tmp_path / "packages" / debian.CUTOUT_PACKAGE / debian.CUTOUT_FOLDER
    stamp = "animals/amphibians/frog.png"
    (stamps / stamp).parent.mkdir(parents=True)
    Image.new("RGBA", (40, 30)).save(stamps / stamp)
    Image.new("RGBA", (40, 30)).save(stamps / "animals" / "drawn.png")
    font = tmp_path / "packages" / debian.EMOJI_PACKAGE / debian.EMOJI_FONT
    font.parent.mkdir(parents=True)
    # glyphs lie between other tables; the third is a shade of the second
    glyphs = [glyph((255, 0, 0)), glyph((0, 0, 255)), glyph((0, 9, 250)), glyph((0, 255, 0))]
    font.write_bytes(b"\0\1\0\0CBDT" + b"....".join(glyphs) + b"tail")
    resource = tmp_path / "packages/gcompris-qt-data/usr/share/x.rcc"
    resource.parent.mkdir(parents=True)
    erase: Tree = {
        "bee.webp": picture((400, 300), "WEBP"),
        "small.webp": picture((90, 90)),
        "sound.ogg": b"",
        "bad.webp": b"x",
    }
    resource.write_bytes(build_rcc({"gcompris": {"src": {"activities": {"erase": {"resource": erase}}}}}))
    wallpaper = tmp_path / "packages/plasma-workspace-wallpapers/usr/share/wallpapers/Path/contents/images"
    wallpaper.mkdir(parents=True)
    for width, height in ((640, 480), (2560, 1440), (800, 600)):
        (wallpaper / f"{width}x{height}.jpg").write_bytes(picture((width, height)))
    monkeypatch.setattr(debian.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(debian, "_apt_options", lambda state: [])
    monkeypatch.setattr(debian, "_run", refuse)
    shaded = [Emoji("1f34e", "Food & Drink", 0x1F34E, picture((8, 8), "WEBP")), Emoji("1f44b", "People & Body", 0, b"")]
    monkeypatch.setattr(debian, "read_emoji", lambda packages: shaded)

    fetch_material(tmp_path)

    made = {path.relative_to(tmp_path / "backgrounds").as_posix() for path in (tmp_path / "backgrounds").rglob("*.jpg")}
    assert made == {"gcompris-qt-data/erase-bee.jpg", "plasma-workspace-wallpapers/Path.jpg"}
    with Image.open(tmp_path / "backgrounds/plasma-workspace-wallpapers/Path.jpg") as image:
        assert image.size == (1820, 1024)  # the largest of the sizes, scaled down to 1024 on the short side
    assert (tmp_path / "cutouts" / stamp).is_file()
    extras = {path.relative_to(tmp_path / "extras").as_posix() for path in (tmp_path / "extras").rglob("*.png")}
    assert extras == {"drawings/animals/drawn.png", "emoji/0000.png", "emoji/0001.png", "emoji/0003.png"}
    assert (tmp_path / "extras/emoji/0003.png").read_bytes() == glyphs[3]
    assert [path.name for path in (tmp_path / "extras/shaded").iterdir()] == ["1f34e.webp"]  # no people
    licences = (tmp_path / "LICENSES.md").read_text()
    assert debian.SHADED_PACKAGE in licences
    assert "erase-bee.jpg" in licences
    assert "3 images in fonts/NotoColorEmoji.ttf" in licences
    assert "mate-backgrounds: left out" in caplog.text  # a package that this release does not have
    assert "bad.webp" in caplog.text


def refuse(command: list[str], cwd: Path | None = None) -> str:
    raise UserError("E: Unable to locate package")


def test_a_failing_tool_is_quoted() -> None:
    with pytest.raises(UserError, match="no such thing"):
        debian._run(["sh", "-c", "echo no such thing >&2; exit 3"])


def test_without_apt_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian.shutil, "which", lambda tool: None)
    with pytest.raises(UserError, match="--cutouts and --backgrounds"):
        fetch_material(tmp_path)


def test_no_network_is_an_error_and_leaves_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 100, "", "E: Could not resolve 'deb.debian.org'\n")

    monkeypatch.setattr(debian.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(debian.subprocess, "run", offline)
    with pytest.raises(UserError, match="Could not resolve"):
        fetch_material(tmp_path)
    assert not (tmp_path / "apt").exists()

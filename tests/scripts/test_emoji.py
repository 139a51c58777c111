"""The emoji that the small pixel model is trained on, from packages made here."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ldm.files import UserError
from scripts.scenes import emoji


def package(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry with a cat, a waving hand in two colours of skin, a person facing right, and a flag."""
    picture = io.BytesIO()
    Image.new("RGBA", (64, 64), (0, 0, 255, 128)).save(picture, "webp", lossless=True)
    codes = ["1f408", "1f44b", "1f44b-1f3fb", "1f6b6-200d-27a1-fe0f", "1f1e9-1f1ea"]
    groups = dict(zip("🐈👋🚶", ["Animals & Nature", "People & Body", "People & Body"], strict=True)) | {"🇩🇪": "Flags"}
    names = json.dumps({key: {"group": group} for key, group in groups.items()}).encode()
    contents = [
        package({f"assets/{code}.webp": picture.getvalue() for code in codes}),
        package({"data-by-emoji.json": names}),
    ]
    answers = {f"p{i}": content for i, content in enumerate(contents)}
    packages = tuple((name, hashlib.sha256(content).hexdigest()) for name, content in answers.items())
    monkeypatch.setattr(emoji, "PACKAGES", packages)
    monkeypatch.setattr(
        emoji.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(answers[url.removeprefix(emoji.REGISTRY)])
    )


@pytest.mark.usefixtures("registry")
def test_pictures_in_classes(tmp_path: Path) -> None:
    assert emoji.main([str(tmp_path), "--size", "16"]) == 0
    written = sorted(path.relative_to(tmp_path).parts[1:] for path in tmp_path.glob("*/*/*.png"))
    assert written == [("animals", "1f408.png"), ("people", "1f44b.png")]
    picture = Image.open(next(tmp_path.glob("*/animals/*.png")))
    assert picture.size == (16, 16) and picture.getpixel((8, 8)) == (127, 127, 255)  # over white


@pytest.mark.usefixtures("registry")
def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "PACKAGES", (("p0", "0" * 64), ("p1", "0" * 64)))
    with pytest.raises(UserError, match="another file"):
        emoji.write_emoji(tmp_path, 16)
    assert emoji.main([str(tmp_path)]) == 2 and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("registry")
def test_what_was_fetched_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(emoji.read_emoji(tmp_path))
    assert [each.code for each in found] == ["1f408", "1f44b"]

    def offline(url: str, timeout: float) -> io.BytesIO:
        raise OSError("no network")

    monkeypatch.setattr(emoji.urllib.request, "urlopen", offline)
    assert list(emoji.read_emoji(tmp_path)) == found
    (tmp_path / "p0").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no network"):
        next(emoji.read_emoji(tmp_path))

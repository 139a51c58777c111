"""Files and folders are written whole or not at all, and damaged zip files are told from whole ones."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from ldm.files import UserError, atomic_directory, atomic_write, read_json, verify_zip, write_json, write_text


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "before")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "new" / "a.txt") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ["before"]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with atomic_directory(folder) as partial:
        (partial / "a").touch()
    with pytest.raises(ZeroDivisionError), atomic_directory(folder) as partial:
        (partial / "b").touch()
        raise ZeroDivisionError
    assert [path.name for path in folder.iterdir()] == ["a"]
    with atomic_directory(folder) as partial:
        (partial / "c").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "c"]


def test_damaged_zip_files(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("member", b"number" * 100)
    assert verify_zip(path) == ""
    content = path.read_bytes()
    path.write_bytes(content.replace(b"number", b"wumber", 1))
    assert "member" in verify_zip(path)
    path.write_bytes(content[:50])
    assert verify_zip(path)


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    assert read_json(path) == {}
    write_json(path, {"steps": 20, "weights": None, "name": "ä"})
    assert read_json(path) == {"steps": 20, "weights": None, "name": "ä"}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"record.json: damaged"):
        read_json(path)

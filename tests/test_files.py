"""Text and tables of any program are read; files are written whole or not at all."""

from __future__ import annotations

import csv
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.files import (
    Skipped,
    UserError,
    atomic_write,
    check_writable,
    claim,
    claimed,
    read_json,
    read_table,
    read_text,
    verify_zip,
    whole,
    write_json,
    write_text,
)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "before")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "new" / "a.txt") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ["before"]


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
    assert read_json(path, {}) == {}
    with pytest.raises(UserError):
        read_json(path)
    write_json(path, {"steps": 20, "weights": None, "name": "ä"})
    assert read_json(path) == {"steps": 20, "weights": None, "name": "ä"}
    for damaged in (path.read_bytes()[:-4], b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"record.json: damaged"):
            read_json(path, {})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_of_any_program_is_read(tmp_path: Path, encoding: str) -> None:
    write_text(tmp_path / "a", "")
    (tmp_path / "a").write_bytes('{"é": 1}\r\n'.encode(encoding))
    assert read_text(tmp_path / "a") == '{"é": 1}\r\n' and read_json(tmp_path / "a") == {"é": 1}
    (tmp_path / "a").write_bytes(b"name\n\n\xe9\n")
    with pytest.raises(UserError, match="line 3"):
        read_text(tmp_path / "a")


CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).map(str.strip).filter(bool)


@given(
    rows=st.lists(st.fixed_dictionaries({"name": CELL}, optional={"note": CELL, "ä ö": CELL}), min_size=1, max_size=4),
    separator=st.sampled_from(",;\t"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", "sep={}", "SEP={}", '"sep={}"']),
)
def test_tables_of_spreadsheets_are_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, str]],
    separator: str,
    encoding: str,
    end: str,
    mark: str,
) -> None:
    path = tmp_path_factory.mktemp("table") / "t.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        file.write(mark and mark.format(separator) + end)
        writer = csv.writer(file, delimiter=separator, lineterminator=end)
        writer.writerow(["", " name", "note ", "ä ö"])  # the first column is an index without a name
        for number, row in enumerate(rows):
            writer.writerow([number, f" {row['name']} ", row.get("note", ""), row.get("ä ö", " ")])
            writer.writerow(["", "", "", ""])
    assert read_table(path) == [(2 * i + 1, row) for i, row in enumerate(rows)]
    path = path.with_suffix(".jsonl")
    path.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    assert read_table(path) == list(enumerate(rows, 1))
    path = path.with_suffix(".json")
    path.write_bytes(json.dumps(rows, ensure_ascii=False, indent=1).encode(encoding))
    assert read_table(path) == list(enumerate(rows, 1))


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    write_text(tmp_path / "t.csv", "a,b\n1,2\n1,2,3\n3\n")
    write_text(tmp_path / "t.jsonl", '{"a": 1}\n{"a": \n[1]\n"text"\n\n{"a": 2}\n{}')
    failed: dict[str, str] = {}
    assert read_table(tmp_path / "t.csv", failed) == [(1, {"a": "1", "b": "2"}), (3, {"a": "3"})]
    assert failed.keys() == {"row 2"}
    assert read_table(tmp_path / "t.jsonl", failed) == [(1, {"a": 1}), (5, {"a": 2}), (6, {})]
    assert failed.keys() == {"row 2", "row 3", "row 4"}
    write_text(tmp_path / "t.json", '[{"a": 1}, 2, {"a": 3}]')
    assert read_table(tmp_path / "t.json", failed) == [(1, {"a": 1}), (3, {"a": 3})]
    for name in ("t.csv", "t.jsonl", "t.json"):
        with pytest.raises(UserError, match="row 2"):
            read_table(tmp_path / name)
    write_text(tmp_path / "t.csv", "a,b, a\n1,2,3\n")
    with pytest.raises(UserError, match="called a"):
        read_table(tmp_path / "t.csv", failed)


def test_whole_numbers() -> None:
    assert [whole(x) for x in ("7", "7.0", 7, 7.0, "-1", str(2**64 - 1), "1e3")] == [7, 7, 7, 7, -1, 2**64 - 1, 1000]
    for x in ("7.5", "seven", "nan", "inf", None, f"{2**60}.0"):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            whole(x)


def test_a_summary_counts_and_names_the_first() -> None:
    skipped = Skipped()
    assert not skipped
    for number in range(9):
        skipped.add("without a box", f"row {number}")
    skipped.add("unreadable", Path("a.png"))
    assert skipped and skipped.counts == {"without a box": 9, "unreadable": 1}
    assert "row 2" in str(skipped) and "row 3" not in str(skipped) and "a.png" in str(skipped)
    with pytest.raises(UserError, match=r"^row 5: unreadable$"):
        Skipped(strict=True).add("unreadable", "row 5")


def test_folders_are_claimed_by_one_process_each(tmp_path: Path) -> None:
    names = [tmp_path / "runs" / letter for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(lambda _: claim(names, folder=True), range(8))} == {*names}
    others = [tmp_path / name for name in ("runs", "b", "runs", "c")]
    assert [claim(others, folder=True) for _ in range(2)] == [tmp_path / "b", tmp_path / "c"]
    with pytest.raises(UserError, match="taken"):
        claim(others, folder=True)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        claim([tmp_path / "file" / "a"], folder=True)


def test_writing_is_tried_first(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "folder"]
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError):
            check_writable(folder)


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "text")
    assert len(list(tmp_path.rglob("*"))) == 1


def test_names_are_claimed_while_a_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "result"
    with claimed(path):
        with pytest.raises(FileExistsError), claimed(path):
            pass
        assert path.exists()
        write_text(path, "done")
    assert path.read_text() == "done"
    with pytest.raises(FileExistsError), claimed(path):
        pass
    with pytest.raises(OSError, match="full"), claimed(tmp_path / "other"):
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]

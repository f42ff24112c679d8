"""Which files are read, and as what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexbench.core.errors import InputFileError
from flexbench.report.reading.files import Kind, find_files

ROW = "1\t2\t4\t256\t32\t22.5\t5.25\n"


def write(folder: Path, *names: str, text: str = "{}\n") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROW if name.endswith(".tsv") else text)


def found(*paths: Path) -> list[Path]:
    files, errors = find_files(paths)
    assert not errors
    return [file.path for file in files]


def test_folders_are_read_to_the_bottom_in_one_order(tmp_path):
    write(
        tmp_path,
        "b.tsv", "a.jsonl", "sub/c.json", "sub/deep/d.TSV", "a/e.tsv",
        "run.log", "notes.txt", ".hidden.tsv", ".cache/f.tsv", "sub/.git/g.json", "h.json.part",
    )  # fmt: skip
    names = [str(path.relative_to(tmp_path)) for path in found(tmp_path)]
    assert names == ["a.jsonl", "b.tsv", "a/e.tsv", "sub/c.json", "sub/deep/d.TSV"]
    assert found(tmp_path) == found(tmp_path)


def test_a_file_is_read_once_whatever_it_is_called(tmp_path):
    write(tmp_path, "a.tsv", "sub/b.jsonl")
    (tmp_path / "link.tsv").symlink_to(tmp_path / "a.tsv")
    os.link(tmp_path / "a.tsv", tmp_path / "hard.tsv")
    a = tmp_path / "a.tsv"
    assert found(a, tmp_path, tmp_path / "sub" / ".." / "a.tsv", tmp_path / "link.tsv") == [
        a,
        tmp_path / "sub" / "b.jsonl",
    ]


def test_links_do_not_lead_in_circles_or_out_of_the_folder(tmp_path):
    write(tmp_path, "inside/a.tsv", "outside/b.tsv")
    (tmp_path / "inside" / "loop").symlink_to(tmp_path / "inside")
    (tmp_path / "inside" / "out").symlink_to(tmp_path / "outside")
    assert found(tmp_path / "inside") == [tmp_path / "inside" / "a.tsv"]
    # A link that the person names is what the person means.
    assert found(tmp_path / "inside" / "out") == [tmp_path / "inside" / "out" / "b.tsv"]


def test_records_beside_rows_belong_to_them(tmp_path):
    write(tmp_path, "a.tsv", "a.jsonl", "b.tsv", "plain", "plain.jsonl")
    (tmp_path / "plain").write_text(ROW)
    files, _ = find_files([tmp_path / "a.tsv", tmp_path / "plain"])
    assert [(file.path.name, file.is_named) for file in files] == [
        ("a.tsv", True),
        ("plain", True),
        ("a.jsonl", False),
        ("plain.jsonl", False),
    ]
    assert [file.rows_path for file in files] == [
        None,
        None,
        tmp_path / "a.tsv",
        tmp_path / "plain",
    ]
    # The other way round nothing is missing: a record says all that its row does.
    (records,), _ = find_files([tmp_path / "a.jsonl"])
    assert records.rows_path is None


def test_points_belong_to_the_rows_of_their_folder(tmp_path):
    write(tmp_path, "serving.tsv", "serving.jsonl", "dummy-1-clients-0123.json", "else/x.json")
    files, _ = find_files([tmp_path])
    rows = {file.path.name: file.rows_path for file in files}
    assert rows["dummy-1-clients-0123.json"] == tmp_path / "serving.tsv"
    assert rows["serving.jsonl"] == tmp_path / "serving.tsv"
    assert rows["x.json"] is None


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("r.tsv", ROW, Kind.ROWS),
        ("r.txt", ROW, Kind.ROWS),
        ("r", "nonsense", Kind.ROWS),
        ("r.jsonl", ROW, Kind.ROWS),
        ("r.tsv", "", Kind.ROWS),
        ("r.jsonl", "", Kind.LINES),
        ("r.jsonl", '{"a": 1}\n{"a": 2}\n', Kind.LINES),
        ("r.jsonl", "{\n}", Kind.LINES),
        ("r.jsonl", "nonsense", Kind.LINES),
        ("r.tsv", '\n \ufeff{"a": 1}\n', Kind.ROWS),
        ("r.tsv", '\ufeff\n {"a": 1}\n', Kind.LINES),
        ("r.txt", '{"a": 1}\n{"a": 2}\n', Kind.LINES),
        ("r.txt", '{\n "a": 1\n}\n', Kind.RECORD),
        ("r.json", '{"a": 1}', Kind.RECORD),
        ("r.json", "[]", Kind.RECORD),
        ("r.json", "", Kind.RECORD),
        ("r.JSON", "nonsense", Kind.RECORD),
        ("r.bin", "\x00\x01", Kind.ROWS),
    ],
)
def test_the_content_says_what_a_file_is(name, text, kind, tmp_path):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    ((file,), _) = find_files([path])
    assert file.kind is kind


def test_what_is_named_has_to_be_there(tmp_path):
    with pytest.raises(InputFileError, match=r"no\.tsv: cannot be read: No such file"):
        find_files([tmp_path / "no.tsv"])
    write(tmp_path, "a.tsv")
    with pytest.raises(InputFileError, match="cannot be read: Not a directory"):
        find_files([tmp_path / "a.tsv" / "b.tsv"])
    with pytest.raises(InputFileError, match="cannot be read: embedded null"):
        find_files([Path("a\x00b.tsv")])
    os.mkfifo(tmp_path / "pipe.tsv")
    with pytest.raises(
        InputFileError, match="is a pipe or a device; reports read files and folders"
    ):
        find_files([tmp_path / "pipe.tsv"])


def test_what_is_found_and_cannot_be_read_is_told(tmp_path):
    write(tmp_path, "a.tsv")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.tsv")
    files, errors = find_files([tmp_path])
    assert [file.path.name for file in files] == ["a.tsv"]
    assert [error.problem for error in errors] == [
        "cannot be read: No such file or directory",
        "is a pipe or a device; reports read files and folders",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_locked_files_and_folders_are_told(tmp_path):
    write(tmp_path, "a.tsv", "sub/b.tsv")
    (tmp_path / "a.tsv").chmod(0)
    (tmp_path / "sub").chmod(0)
    try:
        _, errors = find_files([tmp_path])
    finally:
        (tmp_path / "sub").chmod(0o700)
    assert sorted(str(error) for error in errors) == [
        f"{tmp_path}/a.tsv: cannot be read: Permission denied",
        f"{tmp_path}/sub: cannot be read: Permission denied",
    ]


def test_an_empty_folder_has_nothing(tmp_path):
    assert find_files([tmp_path]) == ([], [])
    assert find_files([]) == ([], [])

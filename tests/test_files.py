"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evc_fast.data import files
from evc_fast.data.files import replacing_folder, write_atomically, write_json
from evc_fast.training.checkpoint import link_folder


def write(folder: Path, text: str) -> None:
    with replacing_folder(folder) as partial:
        (partial / "below").mkdir(parents=True)
        (partial / "below" / "text").write_text(text)


def content(folder: Path) -> dict[str, str]:
    """Everything that stands where `folder` does, leftovers included."""
    found = {str(path.relative_to(folder.parent)): path for path in folder.parent.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in found.items()}


@pytest.mark.parametrize("one_step", [True, False])
def test_a_folder_is_replaced(tmp_path: Path, one_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not one_step:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    folder = tmp_path / "new" / "folder"
    for text in ("first", "second"):
        write(folder, text)
        assert content(folder) == {"folder/below/text": text}


def test_a_folder_is_replaced_in_one_step_where_the_file_system_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    write(folder, "first")
    other.mkdir()
    has_it = files._exchange(folder, other) and files._exchange(folder, other)
    other.rmdir()
    seen: list[bool] = []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        replace(source, target)
        seen.append(folder.exists())

    monkeypatch.setattr(os, "replace", watch)
    write(folder, "second")
    assert seen == ([] if has_it else [False, True])
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    seen.clear()
    write(folder, "third")
    assert seen == [False, True]
    assert content(folder) == {"folder/below/text": "third"}


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "folder", "first")
    link = tmp_path / "link"
    link.symlink_to("folder")
    write(link, "second")
    assert link.is_symlink()
    assert content(tmp_path / "folder") == {"folder/below/text": "second"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_what_was_there_stays_where_writing_or_renaming_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    write(folder, "first")
    with pytest.raises(KeyboardInterrupt), replacing_folder(folder) as partial:
        partial.mkdir()
        (partial / "half").write_text("")
        raise KeyboardInterrupt
    assert content(folder) == {"folder/below/text": "first"}

    replace = os.replace
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)

    def fail_once(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".partial"):
            raise OSError("no space")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="no space"):
        write(folder, "second")
    assert content(folder) == {"folder/below/text": "first"}


def test_a_folder_that_must_be_empty_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with replacing_folder(folder, only_empty=True) as partial:
        partial.mkdir()
        (partial / "text").write_text("first")
    with (
        pytest.raises(FileExistsError, match="has been filled by another process"),
        replacing_folder(folder, only_empty=True) as partial,
    ):
        partial.mkdir()
    assert content(folder) == {"folder/text": "first"}


def test_what_is_no_folder_to_replace_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, here = tmp_path / "file", tmp_path / "here"
    file.write_text("first")
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(NotADirectoryError, match="is a file"):
        write(file, "second")
    for folder in (here, Path(".")):
        with pytest.raises(ValueError, match="is the working directory"):
            write(folder, "second")
    assert content(file) == {"file": "first"}


def test_the_mode_of_a_folder_and_a_link_to_a_file_stay(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    write(folder, "first")
    folder.chmod(0o2770)
    write(folder, "second")
    assert folder.stat().st_mode & 0o7777 == 0o2770
    link.symlink_to(folder / "below" / "text")
    write_atomically(link, b"third")
    assert link.is_symlink() and (folder / "below" / "text").read_text() == "third"


def test_json_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"name": "é"})
    assert path.read_text(encoding="utf-8") == '{\n "name": "é"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"name": object()})

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"name": "other"})
    assert content(path) == {"file.json": '{\n "name": "é"\n}\n'}


def test_who_reads_a_file_that_is_replaced_reads_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with open(path, "rb") as file:
        write_atomically(path, b"new")
        assert file.read() == b"old" and path.read_bytes() == b"new"
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to write file to"):
        write_atomically(tmp_path / "nowhere" / "file", b"")


def test_all_of_a_folder_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write(tmp_path / "folder", "first")
    assert synced == ["text", "below", f".folder.{os.getpid()}.partial", tmp_path.name]
    synced.clear()
    link_folder(tmp_path / "best", lambda folder: (folder / "text").write_text("second"), "step-1")
    assert synced == ["text", "step-1", ".best", tmp_path.name]

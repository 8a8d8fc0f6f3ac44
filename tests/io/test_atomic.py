import errno
import os
import stat

import pytest

from intraslice_jax.errors import InputError, RunError
from intraslice_jax.io.atomic import atomic_file, atomic_folder, check_file, check_output


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def old_output(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("old")
    return path


def test_the_folder_appears_when_complete(tmp_path):
    path = tmp_path / "a" / "b" / "out"
    with atomic_folder(path) as folder:
        (folder / "file").write_text("new")
        assert not path.exists()
        assert folder.parent == path.parent  # on the same file system, so that the rename is one step
    assert names(path) == ["file"]
    assert names(path.parent) == ["out"]


def test_others_may_read_it_as_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert stat.S_IMODE(os.stat(tmp_path / "out").st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


def fail_half_way(path, error, **options):
    with atomic_folder(path, **options) as folder:
        (folder / "half").write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        fail_half_way(tmp_path / "out", error)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_keeps_what_was_there(tmp_path, error):
    path = old_output(tmp_path)
    with pytest.raises(error):
        fail_half_way(path, error, overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (path / "old").read_text() == "old"


def test_what_is_there_is_refused_before_anything_is_written(tmp_path):
    path = old_output(tmp_path)
    with pytest.raises(InputError, match=r"out exists already.*`overwrite=True`"), atomic_folder(path):
        pytest.fail("the block ran")
    assert names(tmp_path) == ["out"]
    assert names(path) == ["old"]


def test_overwriting_replaces_the_whole_folder(tmp_path):
    path = old_output(tmp_path)
    with atomic_folder(path, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert names(path) == ["old"]
    assert names(path) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    path, rename = old_output(tmp_path), os.rename

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"), atomic_folder(path, overwrite=True):
        pass
    assert names(tmp_path) == ["out"]
    assert names(path) == ["old"]


def test_an_output_that_cannot_be_a_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="exists already"):
        check_output(file, overwrite=False)
    for path in (file, file / "in" / "it"):
        with pytest.raises(InputError, match="file is a file; the output must be"):
            check_output(path, overwrite=True)
    assert check_output(str(tmp_path / "new"), overwrite=False) == tmp_path / "new"


@pytest.mark.parametrize("name", ["x" * 240, "é" * 120, "x" * 300 + "/y", "a\0b", ".."])
def test_a_name_that_no_output_can_have(tmp_path, name):
    for check in (check_output, check_file):
        with pytest.raises(InputError) as caught:
            check(tmp_path / name, overwrite=True)
        assert "\n" not in str(caught.value)


def test_a_full_disk_names_the_output(tmp_path):
    for atomic in (atomic_file, atomic_folder):
        with pytest.raises(RunError, match="out cannot be written: no space left on device"), atomic(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert names(tmp_path) == []

"""Tests for dmpo_jax/storage.py and dmpo_jax/errors.py."""

import errno
import json
import sys

import pytest
from etils import epath

from dmpo_jax import errors, storage


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_old_content(tmp_path):
    file = tmp_path / "a.json"
    storage.write_json(file, {"a": "ä", "b": [1]})

    def stopped():
        with storage.replacing(file) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert storage.read_json(file) == {"a": "ä", "b": [1]}
    assert names(tmp_path) == ["a.json"]


def test_an_error_of_a_write_names_the_file(tmp_path):
    """A write to a full disk raises without one."""
    with pytest.raises(OSError) as error, storage.replacing(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert errors.message_of(error.value) == f"{tmp_path / 'a.json'}: No space left on device"


def test_the_new_content_appears_at_once(tmp_path):
    file = tmp_path / "a.txt"
    storage.write_bytes(file, b"old")
    with storage.replacing(file) as part:
        part.write_bytes(b"new")
        assert file.read_bytes() == b"old"
        assert part.name == f"a.txt{storage.PART}"
    assert file.read_bytes() == b"new"
    assert names(tmp_path) == ["a.txt"]


def test_remote_files_are_written_directly(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "is_remote", lambda path: True)
    with storage.replacing(tmp_path / "a") as part:
        assert part == epath.Path(tmp_path / "a")


def test_urls_are_remote_and_stay_as_they_are(tmp_path, monkeypatch):
    assert storage.is_remote("gs://bucket/a")
    assert not storage.is_remote(tmp_path)
    assert str(storage.absolute("gs://bucket/a")) == "gs://bucket/a"
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a") == epath.Path(tmp_path / "a")


def test_broken_json_names_its_file(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(errors.UserError, match=r"a\.json is missing"):
        storage.read_json(file)
    file.write_bytes(json.dumps({"a": 1}).encode()[:-1])
    with pytest.raises(errors.UserError, match=r"a\.json is not valid JSON"):
        storage.read_json(file)
    assert storage.find_json(file) is None
    assert storage.find_json(tmp_path / "absent") is None


def test_which_errors_are_for_the_user():
    assert errors.message_of(errors.UserError("set a")) == "set a"
    assert errors.message_of(errors.MissingFileError("no a")) == "no a"
    assert errors.message_of(errors.MissingPackageError("install a")) == "install a"
    full = OSError(errno.ENOSPC, "No space left on device", "/full")
    assert errors.message_of(full) == "/full: No space left on device"
    for bug in (ValueError("x"), KeyError("x"), OSError(errno.EIO, "I/O error"), ImportError("x")):
        assert errors.message_of(bug) == ""


def test_users_errors_are_what_python_s_callers_expect():
    assert issubclass(errors.MissingFileError, FileNotFoundError)
    assert issubclass(errors.MissingPackageError, ImportError)
    assert issubclass(errors.MissingFileError, ValueError)


def test_a_full_disk_names_the_file_that_could_not_be_written(tmp_path):
    def full(*names):
        raise OSError(errno.ENOSPC, "No space left on device", *names)

    def write():
        with storage.replacing(tmp_path / "a.png"):
            full()

    with pytest.raises(OSError) as raised:
        write()
    assert errors.message_of(raised.value) == f"{tmp_path}/a.png: No space left on device"
    with pytest.raises(OSError) as raised:
        full("source", None, "copy")
    assert errors.message_of(raised.value) == "copy: No space left on device"


def test_what_may_become_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert storage.may_be_folder(tmp_path)
    assert storage.may_be_folder(tmp_path / "a" / "b")
    assert not storage.may_be_folder(tmp_path / "file")
    assert not storage.may_be_folder(tmp_path / "file" / "a")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ImportError, match=r"gs://b/a needs a package.*gcs"):
        storage.may_be_folder("gs://b/a")

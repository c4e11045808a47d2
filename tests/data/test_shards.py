"""Tests for dmpo_jax/data/encoded/shards.py: a disk that fails."""

import os

import pytest
from etils import epath

from dmpo_jax import storage
from dmpo_jax.data.encoded.shards import ShardWriter
from dmpo_jax.errors import UserError


def test_a_full_disk_names_the_file_and_leaves_none(tmp_path):
    folder = epath.Path(tmp_path)

    def write():
        with ShardWriter(folder, "a.array_record") as writer:
            for _ in range(9):
                writer.write(os.urandom(10**5))
            writer.close()

    part = storage.temporary(folder / "a.array_record")
    os.symlink("/dev/full", part)
    with pytest.raises(UserError, match=r"a.array_record could not be written.*same command"):
        write()
    assert list(tmp_path.iterdir()) == []
    write()
    assert [path.name for path in tmp_path.iterdir()] == ["a.array_record"]

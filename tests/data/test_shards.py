"""Tests for dmpo_jax/data/encoded/shards.py: a disk that fails."""

import os

import pytest

from dmpo_jax import storage
from dmpo_jax.data.encoded.shards import ShardWriter
from dmpo_jax.errors import UserError


def test_a_full_disk_names_the_file_and_leaves_none(tmp_path):
    def write():
        with ShardWriter(tmp_path, "a.array_record") as writer:
            for _ in range(9):
                writer.write(os.urandom(10**5))
            writer.close()

    (storage.temporary(tmp_path / "a.array_record")).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"a.array_record could not be written.*same command"):
        write()
    assert list(tmp_path.iterdir()) == []
    write()
    assert [path.name for path in tmp_path.iterdir()] == ["a.array_record"]

"""Model folders in object storage: no library is handed a path that it cannot open."""

import pathlib

import pytest
from etils import epath

from dmpo_jax import diffusers_io, storage
from tests.support import tiny


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A pipeline folder that counts as remote."""
    folder = epath.Path(tmp_path) / "model"
    tiny.debug.write_tiny_pipeline(folder, tiny.FAMILY)
    monkeypatch.setattr(storage, "is_remote", lambda path: str(path).startswith(str(folder)))
    return folder


def test_a_pipeline_in_object_storage_embeds_prompts(remote):
    loaded = diffusers_io.load_pipeline(remote)
    for tokenizer in loaded.tokenizers:
        assert not tokenizer.name_or_path.startswith(str(remote))
        assert not pathlib.Path(tokenizer.name_or_path).exists()  # a copy, which is gone
    assert len(list(diffusers_io.embed_prompts(loaded, ["a cat"], batch_size=1))) == 1


def test_a_local_copy_holds_the_files(remote):
    with storage.local_copy(remote / "unet") as folder:
        assert not str(folder).startswith(str(remote))
        for file in (remote / "unet").iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes()

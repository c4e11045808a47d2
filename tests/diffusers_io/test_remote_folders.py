"""Model folders in object storage, which libraries of tokenizers and PyTorch cannot open."""

from typing import ClassVar

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from dmpo_jax import diffusers_io
from dmpo_jax.diffusers_io import pipeline
from tests.support import tiny


class Bucket(MemoryFileSystem):
    """gs:// in memory: paths of a bucket, as gcsfs gives them."""

    protocol = ("gs", "gcs")
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setitem(fsspec.registry._registry, "gcs", Bucket)
    monkeypatch.setitem(fsspec.registry._registry, "gs", Bucket)
    return epath.Path("gs://bucket")


def upload(local: epath.Path, remote: epath.Path) -> None:
    for path in local.iterdir():
        if path.is_dir():
            upload(path, remote / path.name)
        else:
            (remote / path.name).write_bytes(path.read_bytes())


def test_a_tokenizer_in_a_bucket_is_the_local_one(bucket, tmp_path):
    tiny.debug.write_tiny_pipeline(epath.Path(tmp_path) / "model", tiny.FAMILY)
    upload(epath.Path(tmp_path) / "model", bucket / "model")
    folder, family = diffusers_io.load_family("gs://bucket/model")
    for part in family.text:
        ours = pipeline.load_tokenizer(folder, part.tokenizer)
        want = pipeline.load_tokenizer(epath.Path(tmp_path) / "model", part.tokenizer)
        assert ours("a photo of a cat")["input_ids"] == want("a photo of a cat")["input_ids"]
    loaded = diffusers_io.load_pipeline("gs://bucket/model")
    assert len(list(diffusers_io.embed_prompts(loaded, ["a cat"], batch_size=1))) == 1

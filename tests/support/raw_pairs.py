"""Pairs of noise as people keep them, for the tests of sources."""

import collections
import io

import numpy as np
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from dmpo_jax.data.sources import RawPair


def image(seed: int, kind: str = "PNG", size=(8, 6)) -> bytes:
    """An encoded image of noise: no two seeds give the same bytes."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def write_images(folder, count: int) -> list[bytes]:
    """`0.png` ... in a folder; their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [image(i) for i in range(count)]
    for i, data in enumerate(images):
        (folder / f"{i}.png").write_bytes(data)
    return images


def read(source) -> list:
    """Every pair of a source."""
    return [pair for unit in source.units() for pair in source.read(unit) if is_pair(pair)]


def skipped(source) -> collections.Counter:
    """Counts the records that a source skips, by reason."""
    found = (item for unit in source.units() for item in source.read(unit))
    return collections.Counter(item.reason for item in found if not is_pair(item))


def is_pair(item) -> bool:
    return isinstance(item, RawPair)


def check_units(source, rows: int) -> list:
    """That units cover every row once, in order, and read the same twice; all they hold."""
    units = source.units()
    starts = {}
    for unit in units:
        assert unit.start == starts.get(unit.file, 0), "the rows of a file, in order"
        starts[unit.file] = unit.stop
        assert unit.stop - unit.start < 2000
    assert sum(starts.values()) == rows
    assert len({unit.name for unit in units}) == len(units)
    held = [list(source.read(unit)) for unit in units]
    assert [list(source.read(unit)) for unit in reversed(units)] == held[::-1]
    assert len({item.id for part in held for item in part}) == sum(map(len, held))
    assert len(source) >= sum(map(len, held))
    for unit, part in zip(units, held, strict=True):
        prompts = set(source.prompts(unit))
        assert {pair.prompt for pair in part if is_pair(pair)} <= prompts
    return [item for part in held for item in part]


class _Bucket(MemoryFileSystem):
    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("s3://"))


def make_bucket(monkeypatch) -> MemoryFileSystem:
    """Makes s3:// paths object storage in memory."""
    store = _Bucket()
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda *_: store)
    return store


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()

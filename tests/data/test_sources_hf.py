"""Tests for dmpo_jax/data/sources/hugging_face.py: folders that `datasets` saved."""

import sys
import warnings

import pytest

from dmpo_jax.data import sources
from tests.support.raw_pairs import check_units, image, read, write_images


@pytest.fixture(scope="module")
def datasets():
    with warnings.catch_warnings():  # what it imports warns
        warnings.simplefilter("ignore")
        import datasets

    datasets.disable_progress_bars()
    return datasets


def stored(i):
    return {"bytes": image(i), "path": None}


def test_images_are_read_undecoded(datasets, tmp_path):
    paths = write_images(tmp_path / "im", 2)
    rows = {
        "prompt": [f"prompt {i}" for i in range(70)],
        "image_0": [stored(2 * i) for i in range(70)],
        "image_1": [stored(2 * i + 1) for i in range(69)]
        + [{"bytes": None, "path": str(tmp_path / "im/1.png")}],
        "label_0": [1.0, 0.0, 0.5, float("nan"), None] * 14,
    }
    features = datasets.Features(
        prompt=datasets.Value("string"),
        image_0=datasets.Image(),
        image_1=datasets.Image(),
        label_0=datasets.Value("float64"),
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "data")
    source = sources.open_source(f"hf:{tmp_path}/data")
    found = check_units(source, 70)
    assert len(source) == 70
    for i, item in enumerate(found):
        assert item.id == f"data:{i}"
        if i % 5 > 2:
            assert (item.reason, item.bad) == [("bad label", True), ("no label", False)][i % 5 - 3]
        else:
            second = paths[1] if i == 69 else image(2 * i + 1)
            assert item[1:4] == (f"prompt {i}", (image(2 * i), second), rows["label_0"][i])
    data.select(range(9, -1, -1)).save_to_disk(tmp_path / "reversed")  # by an index
    prompts = [pair.prompt for pair in read(sources.open_source(f"hf:{tmp_path}/reversed"))]
    assert prompts == [f"prompt {i}" for i in (7, 6, 5, 2, 1, 0)]


def test_ranked_lists_of_images(datasets, tmp_path):
    features = datasets.Features(
        caption=datasets.Value("string"),
        images=datasets.List(datasets.Image()),
        ranks=datasets.List(datasets.Value("int64")),
    )
    rows = {
        "caption": ["a", "b"],
        "images": [[stored(0), stored(1), stored(2)], [stored(3), stored(4)]],
        "ranks": [[1, 3, 2], [2, 2]],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    source = sources.open_source(f"hf:{tmp_path}/data")
    pairs = check_units(source, 2)
    assert len(source) == 4
    assert [pair.preference for pair in pairs] == [1.0, 1.0, 0.0, 0.5]
    assert [pair.images for pair in pairs] == [
        (image(i), image(j)) for i, j in ((0, 1), (0, 2), (1, 2), (3, 4))
    ]


def test_refusals(datasets, tmp_path, monkeypatch):
    data = datasets.Dataset.from_dict({"prompt": ["a"], "jpg_0": [b"x"]})
    data.save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"chosen, rejected; .*has \['jpg_0', 'prompt'\]"):
        sources.open_source(f"hf:{tmp_path}/data")
    datasets.DatasetDict(test=data, train=data).save_to_disk(tmp_path / "split")
    with pytest.raises(ValueError, match=r"splits \['test', 'train'\]: give one, .*split/test"):
        sources.open_source(f"hf:{tmp_path}/split")
    with pytest.raises(FileNotFoundError, match="no folder at"):
        sources.open_source(f"hf:{tmp_path}/none")
    with pytest.raises(ValueError, match="cannot be read as a folder of datasets' save_to_disk"):
        sources.open_source(f"hf:{tmp_path}")
    (arrow,) = (tmp_path / "data").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as a folder"):
        sources.open_source(f"hf:{tmp_path}/data")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'datasets"):
        sources.open_source(f"hf:{tmp_path}/data")

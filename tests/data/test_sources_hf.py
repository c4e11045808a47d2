"""Tests for dmpo_jax/data/sources/hugging_face.py: what `datasets` saved, or fetches."""

import os
import sys
import types
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


COMMIT = "0123456789ab" + "c" * 28


@pytest.fixture
def on_hub(datasets, tmp_path, monkeypatch):
    """Makes org/pairs of splits of rows, in parquet files; returns what `datasets` was asked."""
    asked, load_dataset = [], datasets.load_dataset
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def load(repository, *, revision, **kw):
        assert (repository, revision) == ("org/pairs", COMMIT)
        asked.append(kw)
        place = {"cache_dir": str(tmp_path / "cache")}
        return load_dataset(str(tmp_path / "hub"), **place, **kw)

    def about(self, repository, revision=None):
        assert revision in (None, "v1")
        return types.SimpleNamespace(sha=COMMIT)

    def make(**splits):
        for split, data in splits.items():
            data.to_parquet(str(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet"))
        return asked

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", about)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    return make


def made_pairs(datasets, count):
    rows = {
        "prompt": [f"prompt {i}" for i in range(count)],
        "chosen": [stored(2 * i) for i in range(count)],
        "rejected": [stored(2 * i + 1) for i in range(count)],
    }
    picture = datasets.Image()
    features = datasets.Features(prompt=datasets.Value("string"), chosen=picture, rejected=picture)
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_data_set_of_the_hub(datasets, on_hub):
    asked = on_hub(train=made_pairs(datasets, 5), test=made_pairs(datasets, 2))
    with pytest.raises(ValueError, match=r"splits \['test', 'train'\]: name one, such as hf:org/p"):
        sources.open_source("hf:org/pairs")
    with pytest.raises(ValueError, match="but got valid"):
        sources.open_source("hf:org/pairs:valid")
    assert asked == 2 * [{"streaming": True}]  # nothing is fetched that is then refused
    source = sources.open_source("hf:org/pairs@v1:train")
    found = check_units(source, 5)
    for i, pair in enumerate(found):
        assert pair.id == f"org/pairs@{COMMIT[:12]}:train:{i}"
        assert pair[1:4] == (f"prompt {i}", (image(2 * i), image(2 * i + 1)), 1.0)


def test_data_sets_of_the_hub_that_are_refused_before_they_are_fetched(
    datasets, on_hub, monkeypatch
):
    asked = on_hub(train=datasets.Dataset.from_dict({"caption": ["a"], "jpg_0": [b"x"]}))
    with pytest.raises(ValueError, match=r"chosen, rejected; .*has \['caption', 'jpg_0'\]"):
        sources.open_source("hf:org/pairs")
    rows = {"caption": ["a"], "jpg_0": [b"x"], "jpg_1": [b"x"], "label_0": [1.0]}
    on_hub(train=datasets.Dataset.from_dict(rows))
    with pytest.raises(ValueError, match=r"hf download org/pairs .*'pickapic:DIR/data/train-\*"):
        sources.open_source("hf:org/pairs")
    assert all(kw["streaming"] for kw in asked)
    os.mkdir("org")
    with pytest.raises(FileNotFoundError, match=r"though org is there; .*hf:org/pairs@main"):
        sources.open_source("hf:org/pairs")
    os.rmdir("org")

    def unreachable(*given, **kw):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(ValueError, match=r"no route to host. Check .*save_to_disk.*give hf:DIR"):
        sources.open_source("hf:org/pairs")

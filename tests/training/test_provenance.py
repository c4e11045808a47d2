"""Runs and pairs know each other by content: dmpo_jax/training/provenance.py and its users."""

import pathlib
import shutil
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.data import sources
from dmpo_jax.data.encoded import records
from dmpo_jax.jobs import train
from dmpo_jax.jobs.convert import convert
from dmpo_jax.jobs.run import run
from dmpo_jax.models import parameters
from dmpo_jax.toy import debug
from tests.support import outside_family, tiny

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SHORT = {"train__steps": 2, "log__validate_every": 0, "log__checkpoint_every": 2}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with outside_family.registered():
        yield


class Made(NamedTuple):
    model: str
    encoded: str
    workdir: pathlib.Path  # of a run of two steps
    source: str


@pytest.fixture(scope="module")
def original(tmp_path_factory, _registered):
    folder = tmp_path_factory.mktemp("made")
    made = tiny.write(folder, outside_family.write)
    run(tiny.make_config(*made, **SHORT), folder / "run")
    return folder


@pytest.fixture
def moved(original, tmp_path):
    """All that was made, under other paths."""
    folder = shutil.copytree(original, tmp_path / "moved")
    source = f"pickapic:{folder / 'pairs.parquet'}"
    return Made(str(folder / "model"), str(folder / "encoded"), folder / "run", source)


def spoil(folder, load, save):
    """Adds noise to a part's weights, as training it further would."""
    model = load(folder)
    structure, params = parameters.split(model)
    noise = np.random.default_rng(0)
    params = {k: x + jnp.asarray(noise.normal(size=x.shape), x.dtype) for k, x in params.items()}
    save(parameters.merge(structure, params), epath.Path(folder))


def spoil_model(folder):
    spoil(f"{folder}/transformer", diffusers_io.load_model, diffusers_io.save_model)


def spoil_vae(folder):
    spoil(f"{folder}/vae", diffusers_io.load_vae, diffusers_io.save_vae)


def prepare(model, encoded, workdir, **leaves):
    return train.prepare(tiny.make_config(model, encoded, **leaves), epath.Path(workdir))


def go_on(made, **leaves):
    run(tiny.make_config(made.model, made.encoded, **{**SHORT, **leaves}), made.workdir)


@pytest.mark.long
def test_a_run_goes_on_when_its_folders_have_moved(moved):
    go_on(moved, train__steps=3)
    assert (moved.workdir / "checkpoints" / "3").is_dir()


def test_other_weights_at_the_same_path_are_another_run(moved, tmp_path):
    go_on(moved)  # config.json now has the paths of the copy
    spoil_model(moved.model)
    with pytest.raises(ValueError, match=r"content\.model weights: '.*' there, '.*' now"):
        go_on(moved, train__steps=3)
    with pytest.raises(ValueError, match=r"content\.model weights: '.*' there, '.*' now"):
        convert(workdir=moved.workdir, out=tmp_path / "out")


def test_other_pairs_at_the_same_path_are_another_run(moved):
    shutil.rmtree(moved.encoded)
    tiny.encode(moved.source, moved.model, moved.encoded, validation_fraction=0.5)
    with pytest.raises(ValueError, match=r"content\.encoded pairs: '.*' there, '.*' now"):
        go_on(moved)


def test_pairs_of_another_vae_are_refused(moved, tmp_path):
    model, encoded, *_ = moved
    assert set(records.open_pairs(encoded).meta.content) == {"vae", "text_encoder"}
    prepare(model, encoded, tmp_path)
    own = shutil.copytree(f"{model}/vae", tmp_path / "own")
    spoil_vae(model)
    words = r"made by other weights of vae than .*model has: encode the pairs with this model"
    with pytest.raises(ValueError, match=words):
        prepare(model, encoded, tmp_path)
    prepare(model, encoded, tmp_path, model__vae=str(own))
    prepare(model, encoded, tmp_path, data__any_encoders=True)


@pytest.mark.long
def test_the_vae_that_made_the_pairs_is_named(moved, tmp_path):
    other = str(shutil.copytree(moved.model, tmp_path / "other"))
    spoil_vae(other)
    fix, encoded = f"{other}/vae", str(tmp_path / "encoded")
    tiny.encode(moved.source, moved.model, encoded, vae=fix)
    with pytest.raises(ValueError, match=rf"use theirs, --config\.model\.vae={fix}"):
        prepare(moved.model, encoded, tmp_path)
    run(tiny.make_config(moved.model, encoded, **SHORT, model__vae=fix), tmp_path / "run")
    export = tmp_path / "run" / "export"  # decodes as the pairs were encoded
    assert diffusers_io.digest_encoders(export)["vae"] == diffusers_io.digest_encoders(other)["vae"]
    shutil.move(other, tmp_path / "moved_vae")  # the pairs say that it is the same
    fix = str(tmp_path / "moved_vae" / "vae")
    config = tiny.make_config(moved.model, encoded, **{**SHORT, "train__steps": 3}, model__vae=fix)
    run(config, tmp_path / "run")
    index = diffusers_io.read_json(epath.Path(export) / "model_index.json")
    assert index == diffusers_io.read_json(epath.Path(moved.model) / "model_index.json")


@pytest.mark.long
def test_an_encoding_is_done_only_for_the_content_that_it_was_made_from(moved, tmp_path):
    out, source = tmp_path / "encoded", epath.Path(moved.source.partition(":")[2])
    tiny.encode(moved.source, moved.model, out)
    copy = str(shutil.copytree(moved.model, tmp_path / "copy"))
    tiny.encode(moved.source, copy, out)  # done: the same content
    spoil_vae(copy)
    with pytest.raises(ValueError, match=r"another encoding .*weights of vae: '\w+' there"):
        tiny.encode(moved.source, copy, out)
    sources.write_pick_a_pic(source, debug.synthetic_pairs(32))
    with pytest.raises(ValueError, match=r"another encoding \(content of .*pairs\.parquet"):
        tiny.encode(moved.source, moved.model, out)
    source.unlink()
    tiny.encode(moved.source, moved.model, out)  # a source that is gone does not matter

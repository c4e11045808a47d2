"""Image grids of a run: the pairs' own embeddings, and no text encoder beside the training."""

import gc
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import arguments, step_settings
from dmpo_jax.data import sources
from dmpo_jax.data.encoded import prompt_store, records
from dmpo_jax.diffusers_io import components
from dmpo_jax.jobs import train
from dmpo_jax.jobs.run import run
from dmpo_jax.sampling.grids import make_draw
from dmpo_jax.sampling.sampler import make_sampler
from dmpo_jax.toy import debug, make
from tests.support import outside_family, tiny

WIDTH = make.TEXT["hidden_size"]
LEAVES = {
    "model__compute_dtype": "bfloat16",  # in which embeddings are also stored
    "train__steps": 2,
    "log__validate_every": 0,
    "log__sample_every": 2,
    "sample__steps": 2,
    "sample__count": 2,
}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with outside_family.registered():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, _registered):
    """(model, encoded pairs), embedded in bfloat16."""
    folder = tmp_path_factory.mktemp("tiny")
    model = outside_family.write(folder / "model")
    sources.write_pick_a_pic(folder / "pairs.parquet", debug.synthetic_pairs(32))
    leaves = {"jobs": ("encode",), "data__source": f"pickapic:{folder / 'pairs.parquet'}"}
    run(tiny.make_config(model, "", **LEAVES, **leaves), folder)
    return model, str(folder / "encoded")


def refuse(*args, **kw):
    raise AssertionError("a text encoder is loaded")


def draw_both(config, ran, params, folder):
    """(The run's grid at step 0, the same by a pipeline that holds its text encoders)."""
    folder = epath.Path(folder)
    (hook,) = step_settings.grids(config, ran.step, ran.texts, folder)
    state = ran.step.make_state(params)
    hook(state, 0)
    hook.close()

    def opened():
        pipeline = diffusers_io.load_pipeline(config.model.folder, **arguments.pipeline(config))
        return make_sampler(
            pipeline, ran.step.model, devices=ran.step.mesh, **arguments.sampling(config)
        )

    make_draw(opened, ran.texts[0], folder / "wanted")(ran.step.policy(state.params), 0)()
    files = (folder / "samples" / "0.png", folder / "wanted" / "0.png")
    return [file.read_bytes() for file in files]


def held_tables(but=()):
    """Tables of token embeddings that devices hold, `but` those that other tests keep."""
    gc.collect()
    tables = [x for x in jax.live_arrays() if x.ndim == 2 and x.shape[1] == WIDTH > 24]
    return [x for x in tables if not any(x is other for other in but)]


@pytest.mark.long
def test_grids_of_stored_prompts_load_no_text_encoder(made, tmp_path, monkeypatch):
    monkeypatch.setattr(components, "load_text_encoder", refuse)
    run(tiny.make_config(*made, **LEAVES), tmp_path)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["0.png", "2.png"]


@pytest.mark.long
def test_grids_of_stored_prompts_are_those_of_the_encoders(made, tmp_path):
    config = tiny.make_config(*made, **LEAVES)
    got, wanted = draw_both(config, *train.prepare(config, epath.Path(tmp_path)), tmp_path)
    assert got == wanted


@pytest.mark.long
def test_other_prompts_are_embedded_once_and_the_encoders_freed(made, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("the digit three\nthe digit nine, and a moon\n")
    config = tiny.make_config(*made, **LEAVES, sample__prompts=str(tmp_path / "prompts.txt"))
    loaded, load = [], components.load_text_encoder

    def loading(*args, **kw):
        loaded.append(load(*args, **kw))
        return loaded[-1]

    others = held_tables()
    monkeypatch.setattr(components, "load_text_encoder", loading)
    ran, params = train.prepare(config, epath.Path(tmp_path / "run"))
    assert len(loaded) == 1
    assert held_tables(others), "the test does not see the encoder that it holds itself"
    loaded.clear()
    assert not held_tables(others)
    got, wanted = draw_both(config, ran, params, tmp_path)
    assert len(loaded) == 1  # for what is wanted
    assert got == wanted


def test_a_missing_text_encoder_costs_the_grids_alone(made, tmp_path, caplog):
    model = shutil.copytree(made[0], tmp_path / "model")
    shutil.rmtree(model / "text_encoder")
    (tmp_path / "prompts.txt").write_text("nothing like it\n")
    pairs = records.open_pairs(made[1])
    family = diffusers_io.load_family(model)[1]
    leaves = {**LEAVES, "sample__prompts": str(tmp_path / "prompts.txt")}
    config = tiny.make_config(str(model), made[1], **leaves)
    assert step_settings.grid_texts(config, family, pairs) == ([], {})
    assert "no image grids" in caplog.text
    config = tiny.make_config(str(model), made[1], **LEAVES)  # prompts of the data
    prompts, embedded = step_settings.grid_texts(config, family, pairs)
    assert len(prompts) == 2
    assert set(embedded) == {"", *prompts}


def test_prompts_are_found_within_the_bytes_that_a_search_may_read(made, monkeypatch):
    store = records.open_pairs(made[1]).prompts
    texts = [store[j].text for j in range(len(store))]
    assert store.prompt_bytes == outside_family.TOKENS * 32 * 2 + 4
    found = store.find([texts[-1], "unheard of"])
    assert found.keys() == {texts[-1]}
    np.testing.assert_array_equal(
        found[texts[-1]].context.astype(np.float32), store[len(store) - 1].context.astype("float32")
    )
    monkeypatch.setattr(prompt_store, "FIND_BYTES", 2 * store.prompt_bytes)
    assert not store.find([texts[-1]])
    assert set(store.find(["", *texts[1:4]])) == {"", *texts[1:4]}

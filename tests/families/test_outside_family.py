"""A family of flow noise, registered by a test, goes through every job of the package as it is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dmpo_jax import diffusers_io
from dmpo_jax.data import sources
from dmpo_jax.data.encoded import records
from dmpo_jax.jobs.convert import convert
from dmpo_jax.jobs.run import run
from dmpo_jax.jobs.sample import sample
from dmpo_jax.models import parameters
from dmpo_jax.toy import debug
from tests.support import outside_family, tiny
from tests.support.outside_family import FAMILY, TOKENS, OutsideTransformer2DModel


@pytest.fixture(scope="module", autouse=True)
def registered():
    with outside_family.registered():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, registered):
    """(model folder, file of raw pairs)."""
    folder = tmp_path_factory.mktemp("outside")
    sources.write_pick_a_pic(folder / "pairs.parquet", debug.synthetic_pairs(48))
    return outside_family.write(folder / "model"), folder / "pairs.parquet"


def make_config(made, **leaves):
    values = {
        "jobs": ("encode", "train"),
        "data__source": f"pickapic:{made[1]}",
        "data__validation_fraction": 0.25,
        "train__steps": 6,
        "log__checkpoint_every": 3,
        "log__sample_every": 3,
        "sample__steps": 3,
        "sample__count": 1,
        "timesteps__density": "logit_normal",
        "objectives__dmpo__beta": 100.0,
    }
    return tiny.make_config(made[0], "", **{**values, **leaves})


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory, exact_steps):
    """The folder of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    run(make_config(made), workdir)
    return workdir


def arrays(folder):
    return {
        k: np.asarray(x) for k, x in parameters.split(diffusers_io.load_model(folder))[1].items()
    }


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


@pytest.mark.long
def test_pairs_are_encoded_as_the_family_says(finished):
    pairs = records.open_pairs(finished / "encoded")
    prompt = pairs.prompts[1]
    assert prompt.context.shape == (TOKENS, 32)
    assert prompt.context.dtype.name == "bfloat16"
    assert prompt.pooled is None
    lengths = [int(pairs.prompts[i].length) for i in range(len(pairs.prompts))]
    assert lengths[0] == 3  # start, "a", end: the template's own words
    assert 3 < max(lengths) <= TOKENS
    assert pairs.split("train")[0].moments.shape == (2, 8, 8, 8)  # not packed yet
    scaling, shift = FAMILY.factors(None)
    assert (pairs.meta.scaling_factor, pairs.meta.shift_factor) == (scaling, shift)
    assert (pairs.meta.pack, pairs.meta.told_sizes) == (2, False)
    assert pairs.meta.latents == (4, 4, 16)


def test_it_trains_from_margins_of_zero(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "loss" in row)
    assert first["margin_abs_max"] == 0
    steps = losses(finished)
    assert [step for step, *_ in steps] == [1, 2, 3, 4, 5, 6]
    assert np.isfinite([loss for _, loss, _ in steps]).all()
    assert any("validation_loss" in row for row in rows)
    assert (finished / "samples" / "6.png").exists()


@pytest.mark.long
def test_resumed_equals_uninterrupted(made, finished, tmp_path):
    run(make_config(made, train__steps=3), tmp_path)
    run(make_config(made), tmp_path)
    assert losses(tmp_path) == losses(finished)
    ours, theirs = arrays(tmp_path / "export"), arrays(finished / "export")
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_the_export_holds_what_was_trained_and_the_rest_as_it_was(made, finished):
    source, out = arrays(made[0]), arrays(finished / "export")
    assert source.keys() == out.keys()
    same = {path for path in source if np.array_equal(source[path], out[path])}
    assert same == {"positions"}  # the buffer; weight decay would have shrunk it
    assert (finished / "export" / "transformer" / "config.json").exists()
    index = json.loads((finished / "export" / "model_index.json").read_text())
    assert index["_class_name"] == "OutsidePipeline"
    alone = diffusers_io.load_model(finished / "export" / "transformer")
    assert isinstance(alone, OutsideTransformer2DModel)
    names = diffusers_io.state_dict(alone)
    assert {"start_token", "positions", "blocks.0.weight", "norm_out.bias"} <= names.keys()


def draw(model, prompts, out, guidance_scale):
    config = tiny.make_config(model, "", sample__steps=3, sample__guidance_scale=guidance_scale)
    sample(config, prompts=prompts, out=out)


def test_it_draws_images(finished, tmp_path):
    (tmp_path / "prompts.txt").write_text("the digit three\n")
    asked = (str(finished / "export"), tmp_path / "prompts.txt")
    draw(*asked, tmp_path / "a", guidance_scale=2.0)
    image = np.asarray(Image.open(tmp_path / "a" / "00000.png"))
    assert image.shape == (32, 32, 3)
    assert image.std() > 0
    draw(*asked, tmp_path / "b", guidance_scale=0.0)  # weights (1, 0): not guided
    assert (image != np.asarray(Image.open(tmp_path / "b" / "00000.png"))).any()


ADAPTERS = {
    "lora__rank": 2,
    "lora__targets": ("proj_out",),
    "lora__dropout": 0.1,
    "train__ema_decay": 0.9,
    "train__steps": 4,
    "log__checkpoint_every": 2,
    "log__sample_every": 0,
}


@pytest.mark.long
def test_adapters_are_named_by_the_component_and_resume_to_the_same_numbers(made, tmp_path):
    run(make_config(made, **ADAPTERS), tmp_path / "whole")
    adapters = diffusers_io.load_lora(tmp_path / "whole" / "lora", component="transformer")
    assert adapters.keys() == {"proj_out.lora_A.kernel", "proj_out.lora_B.kernel"}
    source, out = arrays(made[0]), arrays(tmp_path / "whole" / "export")
    changed = {path for path in source if not np.array_equal(source[path], out[path])}
    assert changed == {"proj_out.kernel"}
    for steps in (2, 4):
        run(make_config(made, **{**ADAPTERS, "train__steps": steps}), tmp_path / "parts")
    ours = diffusers_io.load_lora(tmp_path / "parts" / "lora", component="transformer")
    for path, want in adapters.items():
        np.testing.assert_array_equal(ours[path], want, err_msg=path)


@pytest.mark.long
def test_policy_and_average_of_a_full_run_are_both_at_hand(made, tmp_path):
    config = make_config(made, train__ema_decay=0.9, train__steps=4, log__sample_every=0)
    run(config, tmp_path / "run")
    for weights in ("policy", "ema"):
        convert(workdir=tmp_path / "run", out=tmp_path / weights, weights=weights)
    exported, average = arrays(tmp_path / "run" / "export"), arrays(tmp_path / "ema")
    for path, want in exported.items():
        np.testing.assert_array_equal(average[path], want, err_msg=path)
    policy = arrays(tmp_path / "policy")
    assert not np.array_equal(policy["proj_out.kernel"], exported["proj_out.kernel"])
    with pytest.raises(ValueError, match="there is no LoRA to merge"):
        convert(workdir=tmp_path / "run", out=tmp_path / "x", merge=True)


def test_a_scheduler_of_other_noise_is_refused(made, tmp_path):
    folder = outside_family.write(tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(
        ValueError, match=r"scheduler_config.json names DDIMScheduler.*'ddpm'.*'flow'"
    ):
        diffusers_io.load_schedule(folder)
    sampling = diffusers_io.load_schedule(made[0])[1]
    with pytest.raises(ValueError, match=r"one of \['flow_euler'\], got 'ddim'"):
        sampling.settings("ddim")


def test_a_buffer_is_neither_trained_nor_kept_in_the_state(made):
    model = diffusers_io.load_model(made[0], abstract=True)
    trained, buffers = parameters.partition(model, parameters.split(model)[1])
    assert buffers.keys() == {"positions"}
    assert isinstance(buffers["positions"], jax.Array)  # read even where nothing else is
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in trained.values())
    assert parameters.completed({"a": 1}, {"a": 2, "b": 3}) == {"a": 1, "b": 3}
    assert parameters.frozen_dtype("start_token", jnp.bfloat16) == jnp.bfloat16
    assert parameters.frozen_dtype("cap_embedder.0.scale", jnp.bfloat16) == jnp.float32

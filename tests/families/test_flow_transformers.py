"""FLUX.2-klein and Z-Image: folders by PyTorch diffusers through every job, and back."""

import functools
import json
import pathlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.data import sources
from dmpo_jax.data.encoded import records
from dmpo_jax.export.pipeline import Trained
from dmpo_jax.export.verify import verify
from dmpo_jax.jobs.run import run
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.lora import Adapters
from dmpo_jax.sampling.sampler import open_sampler
from dmpo_jax.toy import debug
from tests.support import resumed, tiny, torch_flow
from tests.support.torch_flow import SIDE

FAMILIES = ("klein", "z_image")
PROMPT = "the digit three"
TARGETS = {
    "klein": ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out"),
    "z_image": ("to_q", "to_k", "to_v", "to_out.0"),
}


@pytest.fixture(scope="module", autouse=True)
def shortened():
    with torch_flow.shortened():
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory, exact_steps):
    """(family's name, model folder, workdir of a run of all parameters in float32)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = torch_flow.write(request.param, folder / "model")
    sources.write_pick_a_pic(folder / "pairs.parquet", debug.synthetic_pairs(16))
    leaves = {
        "jobs": ("encode", "train"),
        "data__source": f"pickapic:{folder / 'pairs.parquet'}",
        "data__validation_fraction": 0.0,
        "data__resolution": SIDE,
        "train__steps": 2,
        "log__validate_every": 0,
        "objectives__dmpo__beta": 100.0,
    }
    run(tiny.make_config(model, "", **leaves), folder / "run")
    return request.param, model, folder / "run"


def first_margin(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert np.isfinite([row["loss"] for row in rows]).all()
    assert len(rows) == 1 or rows[-1]["margin_abs_max"] > 0
    return rows[0]["margin_abs_max"]


def opened(folder, lora=None):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline


def drawn_by_pytorch(name, pipeline, shape):
    """The image of seed 5, from the noise that our sampler draws."""
    noise = np.asarray(jax.random.normal(jax.random.key(5), shape))
    images = pipeline(
        prompt=[PROMPT],
        latents=torch.tensor(noise)[None].permute(0, 3, 1, 2),
        height=SIDE,
        width=SIDE,
        num_inference_steps=3,
        guidance_scale=2.0,
        output_type="np",
        **torch_flow.told(name),
    ).images
    return 255 * images[0]


def drawn_by_us(folder):
    settings = {"steps": 3, "guidance_scale": 2.0, "batch_size": 1, "height": SIDE, "width": SIDE}
    sampler, load = open_sampler(folder, vae="", variant=None, dtype=jnp.float32, **settings)
    assert sampler.name == "flow_euler"
    return sampler(load(), [PROMPT], [5])[0].astype(np.float64)


@pytest.mark.long
def test_margins_start_at_zero(trained):
    assert first_margin(trained[2]) == 0


@pytest.mark.long
def test_prompts_are_those_of_pytorch(trained):
    name, model, workdir = trained
    pairs = records.open_pairs(workdir / "encoded")
    pipeline = opened(model)
    stored = next(p for i in range(len(pairs.prompts)) if (p := pairs.prompts[i]).text)
    with torch.no_grad():
        told = {"device": "cpu", **torch_flow.told(name)}
        wanted = pipeline.encode_prompt([stored.text], **told)[0][0].numpy()
    context = np.asarray(stored.context, np.float32)
    if name == "z_image":
        assert int(stored.length) == len(wanted)
        context = context[: len(wanted)]
    np.testing.assert_allclose(context, wanted, rtol=2**-7, atol=1e-3)


@pytest.mark.long
def test_an_export_draws_in_pytorch_what_it_draws_here(trained):
    name, model, workdir = trained
    export = workdir / "export"
    assert verify(epath.Path(export), Trained(str(export), None, None)) <= 1e-5
    pipeline = opened(export)
    assert (
        type(pipeline).__name__
        == json.loads((pathlib.Path(model) / "model_index.json").read_text())["_class_name"]
    )
    side = SIDE // 8 if name == "klein" else SIDE // 4
    wanted = drawn_by_pytorch(name, pipeline, (side, side, 32 if name == "klein" else 8))
    ours = drawn_by_us(export)
    assert np.abs(ours - wanted).mean() <= 1
    assert wanted.std() > 5


@pytest.mark.long
def test_adapters_in_bfloat16_start_at_zero_and_load_in_pytorch(trained, tmp_path):
    name, model, workdir = trained
    leaves = {
        "model__compute_dtype": "bfloat16",
        "model__scan": True,
        "model__remat": "transformer",
        "lora__rank": 2,
        "lora__targets": TARGETS[name],
        "train__steps": 2,
        "log__validate_every": 0,
        "optimizer__learning_rate": 1e-2,
        "optimizer__warmup_steps": 1,
    }
    run(tiny.make_config(model, str(workdir / "encoded"), **leaves), tmp_path)
    assert first_margin(tmp_path) == 0
    merged, adapted = opened(tmp_path / "export").transformer, opened(model, tmp_path / "lora")
    family = diffusers_io.load_family(model)[1]
    inputs = family.random_inputs(dict(merged.config), largest=4, tokens=8)
    told = jax.tree.map(torch.tensor, family.torch_inputs(*inputs))
    with torch.no_grad():
        before = opened(model).transformer(**told).sample
        pairs = [transformer(**told).sample for transformer in (merged, adapted.transformer)]
    flat = [np.concatenate([x.numpy().ravel() for x in y]) for y in (before, *pairs)]
    change = np.linalg.norm(flat[1] - flat[0])
    assert change > 0
    assert np.linalg.norm(flat[2] - flat[1]) <= 0.02 * change + 1e-5 * np.linalg.norm(flat[0])


@pytest.mark.slow
def test_a_full_run_in_bfloat16_starts_at_zero(trained, tmp_path):
    _, model, workdir = trained
    leaves = {
        "model__compute_dtype": "bfloat16",
        "train__steps": 1,
        "log__validate_every": 0,
        "optimizer__warmup_steps": 0,
    }
    run(tiny.make_config(model, str(workdir / "encoded"), **leaves), tmp_path)
    assert first_margin(tmp_path) == 0


@pytest.mark.slow
def test_resumed_equals_uninterrupted(trained, tmp_path):
    _, model, workdir = trained
    resumed.assert_same(
        functools.partial(tiny.make_config, model, str(workdir / "encoded")), tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_that_go_on_from_a_lora_file_start_at_zero(dtype, trained, tmp_path):
    name, model, workdir = trained
    family = diffusers_io.load_family(model)[1]
    adapters = Adapters(rank=2, targets=TARGETS[name])
    shapes = lora.partition(
        parameters.shapes(adapters.attach(diffusers_io.load_model(model, abstract=True)))
    )[1]
    rng = np.random.default_rng(0)
    moved = {path: 0.3 * rng.normal(size=x.shape) for path, x in shapes.items()}
    file = epath.Path(tmp_path / "sft")
    diffusers_io.save_lora(moved, file, scale=1.0, component=family.component)
    leaves = {
        "model__start": str(file),
        "model__compute_dtype": dtype,
        "lora__rank": 2,
        "lora__alpha": 6.0,
        "lora__targets": TARGETS[name],
        "train__steps": 2,
        "log__validate_every": 0,
        "optimizer__learning_rate": 1e-2,
        "optimizer__warmup_steps": 1,
    }
    run(tiny.make_config(model, str(workdir / "encoded"), **leaves), tmp_path / "run")
    assert first_margin(tmp_path / "run") == 0

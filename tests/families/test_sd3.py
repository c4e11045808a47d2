"""SD3 through every job, from a folder of PyTorch's to one that PyTorch opens again."""

import functools
import json

import jax
import numpy as np
import pytest
import torch

from dmpo_jax import diffusers_io
from dmpo_jax.data import sources
from dmpo_jax.data.encoded import records
from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.jobs.convert import convert
from dmpo_jax.jobs.run import run
from dmpo_jax.jobs.verify import verify
from dmpo_jax.models import parameters
from dmpo_jax.sampling.sampler import make_sampler
from dmpo_jax.toy import debug
from tests.support import resumed, tiny, torch_sd3

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STEPS, SCALE = 4, 4.0  # of sampling
BUFFER = "pos_embed.pos_embed"
LORA = ("attn.to_q", "attn.add_k_proj", "attn.to_out.0", "attn.to_add_out")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model folder, file of raw pairs)."""
    folder = tmp_path_factory.mktemp("sd3")
    sources.write_pick_a_pic(folder / "pairs.parquet", debug.synthetic_pairs(16))
    return torch_sd3.write(folder / "model"), folder / "pairs.parquet"


def make_config(made, **leaves):
    values = {
        "jobs": ("encode", "train"),
        "data__source": f"pickapic:{made[1]}",
        "data__validation_fraction": 0.0,
        "train__steps": 2,
        "log__validate_every": 0,
        "optimizer__warmup_steps": 0,
        "timesteps__density": "logit_normal",
        "objectives__dmpo__beta": 100.0,
    }
    return tiny.make_config(made[0], "", **{**values, **leaves})


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory, exact_steps):
    """The folder of a run that trained every parameter."""
    workdir = tmp_path_factory.mktemp("full")
    run(make_config(made, log__sample_every=2, sample__steps=2, sample__count=1), workdir)
    return workdir


def arrays(folder):
    return {
        k: np.asarray(x) for k, x in parameters.split(diffusers_io.load_model(folder))[1].items()
    }


@pytest.mark.long
def test_pairs_are_conditioned_as_in_pytorch(made, finished):
    pairs = records.open_pairs(finished / "encoded")
    assert pairs.meta.latents == (8, 8, 16)
    assert (pairs.meta.scaling_factor, pairs.meta.shift_factor) == (1.5305, 0.0609)
    prompts = [pairs.prompts[i] for i in range(len(pairs.prompts))]
    assert prompts[0].text == ""
    pipeline = torch_sd3.open_in_pytorch(made[0])
    texts = [prompt.text for prompt in prompts]
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False
        )
    for prompt, states, row in zip(prompts, context, pooled, strict=True):
        assert prompt.context.shape == (8 + 256, 48)
        assert prompt.context.dtype.name == "bfloat16"
        for got, want in ((prompt.context, states), (prompt.pooled, row)):
            np.testing.assert_allclose(np.float32(got), want.float(), rtol=2**-8, atol=1e-4)


@pytest.mark.long
def test_training_moves_all_but_the_positions(made, finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["margin_abs_max"] == 0
    assert steps[-1]["margin_abs_max"] > 0
    assert (finished / "samples" / "2.png").exists()
    before, after = arrays(made[0]), arrays(finished / "export")
    assert {path for path in before if np.array_equal(before[path], after[path])} == {BUFFER}
    parts = verify(folder=finished)
    assert any(part.endswith("text_encoder_3") for part in parts)


def draw(folder, model, prompts) -> np.ndarray:
    sampler = make_sampler(
        diffusers_io.load_pipeline(folder), model, steps=STEPS, guidance_scale=SCALE, batch_size=8
    )
    return sampler(parameters.split(model)[1], prompts, list(range(len(prompts)))) / 255.0


def draw_in_pytorch(pipeline, prompts) -> list[np.ndarray]:
    """In [0, 1], from the noise that our sampler draws of the same seeds."""
    images = []
    for seed, prompt in enumerate(prompts):
        noise = np.asarray(jax.random.normal(jax.random.key(seed), (1, 8, 8, 16)))
        images += list(
            pipeline(
                prompt.text,
                latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
                height=torch_sd3.SIDE,
                width=torch_sd3.SIDE,
                num_inference_steps=STEPS,
                guidance_scale=SCALE,
                output_type="np",
            ).images
        )
    return images


PROMPTS = [Prompt("a handwritten one"), Prompt("a handwritten two")]


@pytest.mark.long
def test_the_export_draws_the_same_in_pytorch(finished):
    out = finished / "export"
    ours = draw(out, diffusers_io.load_model(out), PROMPTS)
    theirs = torch_sd3.open_in_pytorch(out)
    for image, drawn in zip(ours, draw_in_pytorch(theirs, PROMPTS), strict=True):
        assert np.abs(image - drawn).mean() <= 0.5 / 255  # rounding to 8 bits alone: 0.25
    assert np.ptp(ours) > 0.1


@pytest.mark.slow
def test_adapters_draw_the_same_in_pytorch(made, finished, tmp_path):
    """Beside the base through `load_lora_weights`, and folded into it."""
    lora = {"lora__rank": 2, "lora__targets": LORA, "optimizer__learning_rate": 0.2}
    run(make_config(made, **lora), tmp_path / "run")
    convert(workdir=tmp_path / "run", out=tmp_path / "lora", verify=True)
    convert(workdir=tmp_path / "run", out=tmp_path / "merged", merge=True)
    before, after = arrays(made[0]), arrays(tmp_path / "merged")
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert len(changed) == 3 * len(LORA) - 1  # the last block has no to_add_out
    assert all(".attn." in path for path in changed)
    ours = draw(made[0], diffusers_io.load_model(tmp_path / "merged"), PROMPTS)
    plain = draw(made[0], diffusers_io.load_model(made[0]), PROMPTS)
    assert np.abs(ours - plain).mean() > 1 / 255
    theirs = torch_sd3.open_in_pytorch(made[0])
    theirs.load_lora_weights(str(tmp_path / "lora"))
    for image, drawn in zip(ours, draw_in_pytorch(theirs, PROMPTS), strict=True):
        assert np.abs(image - drawn).mean() <= 0.5 / 255


@pytest.mark.slow
def test_resumed_equals_uninterrupted(made, finished, tmp_path):
    encoded = {"jobs": ("train",), "data__encoded": str(finished / "encoded")}
    resumed.assert_same(functools.partial(make_config, made, **encoded), tmp_path)


def test_without_t5_its_states_are_zeros(tmp_path):
    folder = torch_sd3.write(tmp_path / "model", t5=False)
    path, family = diffusers_io.load_family(folder)
    assert [part.name for part in family.text] == ["text_encoder", "text_encoder_2"]
    assert diffusers_io.load_family(folder)[1] is family  # one compilation
    texts = ["a handwritten one", ""]
    got = list(diffusers_io.embed_prompts(diffusers_io.load_pipeline(path), texts, batch_size=2))
    with torch.no_grad():
        context, _, pooled, _ = torch_sd3.open_in_pytorch(folder).encode_prompt(
            texts, None, None, do_classifier_free_guidance=False
        )
    for ours, states, row in zip(got, context, pooled, strict=True):
        assert (ours.context[8:] == 0).all()
        np.testing.assert_allclose(ours.context, states, atol=1e-5)
        np.testing.assert_allclose(ours.pooled, row, atol=1e-5)
    assert set(diffusers_io.digest_encoders(path)) == {"vae", "text_encoder", "text_encoder_2"}


def test_the_sampler_spaces_its_levels_as_the_pipeline(made):
    _, sampling = diffusers_io.load_schedule(made[0])
    assert sampling.settings("flow_euler", tokens=16)["even_sigmas"] is False

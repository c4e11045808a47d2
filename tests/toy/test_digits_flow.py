"""The digits' flow transformer: what its command writes, and its images in PyTorch."""

import json
import pathlib

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open

from dmpo_jax import diffusers_io
from dmpo_jax.config.files import load_config
from dmpo_jax.jobs.make_digits import make_digits
from dmpo_jax.jobs.run import run
from dmpo_jax.models import parameters
from dmpo_jax.sampling.sampler import make_sampler
from dmpo_jax.scoring import SCORERS, make_scorer
from dmpo_jax.toy import digits
from tests.support import torch_sd3

FOLDER = digits.FLOW_PIPELINE
STEPS = 10


def files(folder) -> set[str]:
    paths = pathlib.Path(folder).rglob("*")
    return {str(path.relative_to(folder)) for path in paths if path.is_file()}


def tensors(file) -> dict[str, tuple[list[int], str]]:
    """Name -> (shape, dtype)."""
    with safe_open(file, "np") as opened:
        found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: (x.get_shape(), x.get_dtype()) for name, x in found.items()}


FACTORS = ("scaling_factor", "shift_factor")  # measured, so rounded as the machine rounds


@pytest.mark.long
def test_the_shipped_folder_is_what_the_command_writes(tmp_path):
    """All but the values of the trained model."""
    out = make_digits(out=tmp_path / "digits", family="sd3", vae=str(digits.PIPELINE))
    assert files(out) - files(FOLDER) == {"real_digits.parquet"}
    assert not files(FOLDER) - files(out)
    for name in files(FOLDER):
        here, there = out / name, FOLDER / name
        if name.endswith(".json"):
            made, shipped = json.loads(here.read_text()), json.loads(there.read_text())
            if name == "vae/config.json":
                factors = [[config.pop(key) for key in FACTORS] for config in (made, shipped)]
                np.testing.assert_allclose(*factors, rtol=1e-4)
            assert made == shipped, name
        elif name.startswith("transformer"):
            assert tensors(here) == tensors(there)
            assert here.read_bytes() != there.read_bytes()
        else:
            assert here.read_bytes() == there.read_bytes(), name


@pytest.fixture(scope="module")
def drawn():
    """(images of our sampler, their prompts) of seeds 0 to 79."""
    pipeline, model = diffusers_io.load_pipeline(FOLDER), diffusers_io.load_model(FOLDER)
    sampler = make_sampler(pipeline, model, steps=STEPS, guidance_scale=1.0, batch_size=80)
    prompts = list(digits.CAPTIONS) * 8
    return sampler(parameters.split(model)[1], prompts, list(range(80))), prompts


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_images_equal_those_of_pytorch(drawn):
    noise = np.stack([jax.random.normal(jax.random.key(seed), (8, 8, 4)) for seed in range(8)])
    theirs = torch_sd3.open_in_pytorch(FOLDER)(
        list(digits.CAPTIONS[:8]),
        latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        height=digits.SIZE,
        width=digits.SIZE,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        output_type="np",
    ).images
    ours = drawn[0][:8]
    assert np.abs(ours / 255.0 - theirs).mean() <= 1 / 255
    assert np.ptp(ours) > 100  # images, not paper


def test_the_base_draws_readable_but_imperfect_digits(drawn):
    for name in SCORERS:
        assert 0.3 < make_scorer(name)(*drawn).mean() < 0.85


@pytest.mark.parametrize("name", ["digits_dmpo", "digits_flow_dmpo"])
def test_the_main_jobs_pass_their_checks(name, tmp_path, capsys):
    config = load_config(name)
    config.mesh.cpu_devices = 1  # no more are made once JAX has begun
    run(config, tmp_path / "run", dry_run=True)  # exits with 1 for a refusal
    said = capsys.readouterr().out
    assert "refusals: none" in said
    assert not list(tmp_path.iterdir())

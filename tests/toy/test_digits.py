"""The embedded digits pipeline: opens in PyTorch, and draws the same images as ours."""

import shutil

import jax
import numpy as np
import pytest
import torch

from dmpo_jax import diffusers_io
from dmpo_jax.data.prompt_files import load_texts
from dmpo_jax.encoding.pixels import prepare
from dmpo_jax.models import parameters
from dmpo_jax.sampling.sampler import make_sampler
from dmpo_jax.scoring import SCORERS, make_scorer
from dmpo_jax.toy import digits

FOLDER = digits.PIPELINE


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("scheduler", "guidance_scale"),
    [
        ("DDIMScheduler", 1.0),
        pytest.param("EulerDiscreteScheduler", 3.0, marks=pytest.mark.slow),
        pytest.param("DDIMScheduler", 3.0, marks=pytest.mark.slow),
        pytest.param("DPMSolverMultistepScheduler", 3.0, marks=pytest.mark.slow),
    ],
)
def test_images_equal_those_of_pytorch(tmp_path, scheduler, guidance_scale):
    from diffusers import StableDiffusionPipeline

    folder = tmp_path / "model"
    shutil.copytree(FOLDER, folder)
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("DDIMScheduler", scheduler))
    pipe = StableDiffusionPipeline.from_pretrained(str(folder))
    assert type(pipe.scheduler).__name__ == scheduler
    pipe.set_progress_bar_config(disable=True)
    prompts, seeds = list(digits.CAPTIONS[:8]), list(range(8))
    noise = np.stack([jax.random.normal(jax.random.key(s), (8, 8, 4)) for s in seeds])
    theirs = pipe(
        prompts,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        num_inference_steps=20,
        guidance_scale=guidance_scale,
        output_type="np",
    ).images
    pipeline = diffusers_io.load_pipeline(folder)
    unet = diffusers_io.load_unet(folder)
    sampler = make_sampler(pipeline, unet, steps=20, guidance_scale=guidance_scale, batch_size=8)
    ours = sampler(parameters.split(unet)[1], prompts, seeds)
    assert np.abs(ours / 255.0 - theirs).mean() <= 1 / 255
    assert np.ptp(ours) > 100  # images, not paper


@pytest.mark.long
def test_the_base_draws_readable_but_imperfect_digits():
    pipeline, unet = diffusers_io.load_pipeline(FOLDER), diffusers_io.load_unet(FOLDER)
    sampler = make_sampler(pipeline, unet, steps=20, guidance_scale=1.0, batch_size=80)
    prompts = load_texts(FOLDER / "prompts.txt") * 8
    images = sampler(parameters.split(unet)[1], prompts, list(range(80)))
    for name in SCORERS:
        assert 0.3 < make_scorer(name)(images, prompts).mean() < 0.85


@pytest.mark.long
def test_an_image_does_not_depend_on_its_batch():
    pipeline, unet = diffusers_io.load_pipeline(FOLDER), diffusers_io.load_unet(FOLDER)
    params = parameters.split(unet)[1]
    draw = make_sampler(pipeline, unet, steps=5, guidance_scale=1.0, batch_size=8)
    prompts = list(digits.CAPTIONS)
    together = draw(params, prompts, list(range(10)))
    apart = draw(params, prompts[7:], [7, 8, 9])
    assert np.abs(together[7:].astype(int) - apart.astype(int)).max() <= 1


def test_vae_keeps_the_digits():
    vae = diffusers_io.load_vae(FOLDER)
    images = digits.to_images(digits.load_digits()[0][:64])
    x = images.astype(np.float32) / 127.5 - 1
    back = jax.jit(lambda x: vae.decode(vae.encode(x)[..., :4]))(x)
    assert np.square(np.asarray(back) - x).mean() < 4e-3


def test_captions_images_and_ink():
    ink, labels = digits.load_digits()
    images = digits.to_images(ink[:50])
    assert images.shape == (50, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.abs(digits.to_ink(images) - ink[:50]).mean() < 0.05
    assert [digits.caption_digit(c) for c in digits.CAPTIONS] == list(range(10))
    with pytest.raises(ValueError, match="names 0 digits"):
        digits.caption_digit("a cat")
    assert not set(digits.half(0)) & set(digits.half(1))
    assert len(digits.half(0)) + len(digits.half(1)) == len(labels)


def test_prepare_records_sizes_and_crop():
    image = np.zeros((60, 90, 3), np.uint8)
    out, sizes = prepare(image, 30)
    assert out.shape == (30, 30, 3)
    assert sizes == (60, 90, 0, 7, 30, 30)

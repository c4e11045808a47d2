"""Exports, opened by PyTorch's pipelines, draw the images of our own sampler."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from PIL import Image

from dmpo_jax import diffusers_io
from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.models import lora, parameters
from dmpo_jax.sampling.sampler import make_sampler
from tests.support import torch_pipelines

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
STEPS, SCALE, IMAGE_SCALE = 5, 5.0, 1.5
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("sd15", "sd2", "sdxl", "sdxl_edit")]
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "proj_in")


def moved(params: dict, scale: float) -> dict:
    rng = np.random.default_rng(0)
    return {
        path: x + jnp.asarray(scale * rng.normal(size=x.shape) * (np.std(x) + 0.01), x.dtype)
        for path, x in params.items()
    }


def open_in_pytorch(name: str, folder):
    kind = getattr(diffusers, torch_pipelines.PIPELINES[name][0])
    more = {"add_watermarker": False} if "XL" in kind.__name__ else {}
    pipeline = kind.from_pretrained(str(folder), **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_in_pytorch(pipeline, prompt: Prompt, seed: int, **given) -> np.ndarray:
    """In [0, 1], from the noise that our sampler draws of the same seed."""
    noise = np.asarray(jax.random.normal(jax.random.key(seed), (1, 8, 8, 4)))
    if prompt.image:
        given |= {"image": Image.open(prompt.image), "image_guidance_scale": IMAGE_SCALE}
    return pipeline(
        prompt.text,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="np",
        **given,
    ).images[0]


def draw_ours(folder, unet, prompts: list[Prompt]) -> np.ndarray:
    sampler = make_sampler(
        diffusers_io.load_pipeline(folder),
        unet,
        steps=STEPS,
        guidance_scale=SCALE,
        image_guidance_scale=IMAGE_SCALE,
        batch_size=8,
    )
    return sampler(parameters.split(unet)[1], prompts, [0, 1])


def make_prompts(name: str, folder) -> list[Prompt]:
    texts = ("a handwritten one", "a handwritten two")
    if "edit" not in name:
        return [Prompt(text) for text in texts]
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "source.png")
    return [Prompt(text, image=str(folder / "source.png")) for text in texts]


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd_edit", *SLOW])
def test_an_exported_pipeline_draws_the_same(name, tmp_path):
    source = torch_pipelines.write(name, tmp_path / "model")
    unet = diffusers_io.load_unet(source)
    structure, params = parameters.split(unet)
    params = moved(params, 0.1)
    out = tmp_path / "export"
    diffusers_io.save_pipeline(unet, source, out, params=params)
    prompts = make_prompts(name, tmp_path)
    ours = draw_ours(out, parameters.merge(structure, params), prompts)
    theirs = open_in_pytorch(name, out)
    for seed, (prompt, image) in enumerate(zip(prompts, ours, strict=True)):
        drawn = draw_in_pytorch(theirs, prompt, seed)
        assert np.abs(image / 255.0 - drawn).mean() <= 0.5 / 255  # rounding to 8 bits alone: 0.25
    assert np.ptp(ours) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_exported_adapters_draw_the_same(name, tmp_path):
    """Beside the base through `load_lora_weights`, and folded into it."""
    source = torch_pipelines.write(name, tmp_path / "model")
    base = diffusers_io.load_unet(source)
    adapted = lora.attach(base, rank=4, alpha=6.0, targets=TARGETS, seed=0)
    structure, params = parameters.split(adapted)
    frozen, adapters = lora.partition(params)
    adapters = moved(
        adapters, 4.0
    )  # at 20 so random a model is chaotic: PyTorch differs from itself
    diffusers_io.save_lora(adapters, epath.Path(tmp_path / "lora"), scale=1.5)
    prompts = make_prompts(name, tmp_path)
    ours = draw_ours(source, parameters.merge(structure, {**frozen, **adapters}), prompts)
    plain = draw_ours(source, base, prompts)
    assert np.abs(ours / 255.0 - plain / 255.0).mean() > 2 / 255  # it does change the images
    theirs = open_in_pytorch(name, source)
    theirs.load_lora_weights(str(tmp_path / "lora"))
    folded = dict(frozen)
    lora.fold_in(folded, adapters, 1.5)
    diffusers_io.save_pipeline(base, source, tmp_path / "folded", params=folded)
    for pipeline in (theirs, open_in_pytorch(name, tmp_path / "folded")):
        for seed, (prompt, image) in enumerate(zip(prompts, ours, strict=True)):
            drawn = draw_in_pytorch(pipeline, prompt, seed)
            assert np.abs(image / 255.0 - drawn).mean() <= 0.5 / 255

"""LoRA files in kohya's keys, against diffusers' own reading of them."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors.torch import load_file, save_file

from dmpo_jax import diffusers_io
from dmpo_jax.diffusers_io import kohya
from dmpo_jax.errors import UserError
from dmpo_jax.models import lora, parameters
from tests.support import torch_pipelines

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
NAMES = ("sd15", "sdxl")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Every layer that may be adapted, by the end of its path.
EVERY = (
    *(*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"),
    *("time_emb_proj", "conv_shortcut", "conv", "conv_in", "conv_out", "linear_1", "linear_2"),
)


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory):
    """(name, pipeline folder, our UNet, adapters of every layer) of one architecture."""
    folder = tmp_path_factory.mktemp(request.param)
    source = torch_pipelines.write(request.param, folder / "model")
    unet = diffusers_io.load_unet(source)
    adapted = lora.attach(unet, rank=2, alpha=2, targets=EVERY, seed=0)
    _, adapters = lora.partition(parameters.split(adapted)[1])
    rng = np.random.default_rng(0)
    adapters = {
        path: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32)
        for path, x in adapters.items()
    }
    return request.param, source, unet, adapters


def save(made, folder, *, scale=1.5):
    """The file in kohya's keys."""
    diffusers_io.save_lora(made[3], folder, scale=scale, keys=kohya.written(made[2]))
    return folder / diffusers_io.LORA_FILE


def predict(name: str, source: str, file=None) -> np.ndarray:
    """The prediction of diffusers' pipeline, after `load_lora_weights`."""
    pipeline = getattr(diffusers, torch_pipelines.PIPELINES[name][0]).from_pretrained(source)
    if file:
        pipeline.load_lora_weights(str(file))
    generator = torch.Generator().manual_seed(0)
    unet, more = pipeline.unet, {}
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    if name == "sdxl":
        pooled = torch.randn(2, 24, generator=generator)
        more = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 32.0)}
    with torch.no_grad():
        return unet(latents, torch.tensor([3, 500]), text, added_cond_kwargs=more).sample.numpy()


def relative(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_diffusers_predicts_the_same_by_both_keys(made, tmp_path):
    name, source, _, adapters = made
    file = save(made, tmp_path / "kohya")
    diffusers_io.save_lora(adapters, tmp_path / "own", scale=1.5)
    theirs = predict(name, source, tmp_path / "own" / diffusers_io.LORA_FILE)
    assert relative(predict(name, source, file), theirs) <= 1e-6
    assert relative(predict(name, source), theirs) > 0.05  # the adapters do something


def test_our_reader_gives_the_same_arrays(made, tmp_path):
    _, _, unet, adapters = made
    save(made, tmp_path / "kohya")
    diffusers_io.save_lora(adapters, tmp_path / "own", scale=1.5)
    got = diffusers_io.load_lora(tmp_path / "kohya", model=unet)
    want = diffusers_io.load_lora(tmp_path / "own")
    assert got.keys() == want.keys() == adapters.keys()
    for path, x in want.items():
        np.testing.assert_array_equal(got[path], x, err_msg=path)


def test_every_key_is_one_that_diffusers_maps_to_the_layer(made, tmp_path):
    """No key is dropped or mistaken for another's, in either spelling."""
    name, source, unet, _ = made
    config = diffusers.UNet2DConditionModel.load_config(source, subfolder="unet")
    config = diffusers.UNet2DConditionModel.from_config(config).config
    spellings = [kohya.written(unet)]
    if name == "sdxl":
        assert all("_blocks" in key or "lora_unet_" in key for key in spellings[0].values())
        spellings.append({layer: key for key, layer in kohya.read(unet).items()})
    file = save(made, tmp_path)
    tensors = load_file(file)
    found, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=config)
    assert len(found) == len(made[3])

"""LoRA files in kohya's keys, against diffusers' own reading of them."""

import types

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file

from dmpo_jax import diffusers_io
from dmpo_jax.diffusers_io import kohya
from dmpo_jax.families import PUBLISHED
from dmpo_jax.models import lora, parameters
from tests.support import torch_pipelines

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
# Every layer that may be adapted, by the end of its path.
EVERY = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out"),
    *("time_emb_proj", "linear_1", "linear_2"),
)
SCALE = 1.5


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def made(request, tmp_path_factory):
    """(name, pipeline folder, our UNet, folder): of adapters of every layer, in both keys."""
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
    diffusers_io.save_lora(adapters, folder / "own", scale=SCALE)
    diffusers_io.save_lora(adapters, folder / "kohya", scale=SCALE, keys=kohya.written(unet))
    return request.param, source, unet, folder


def predict(pipeline, name: str) -> np.ndarray:
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


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for path, x in want.items():
        np.testing.assert_array_equal(got[path], x, err_msg=path)


def rewrite(made, file, change, **more):
    """A file like that in kohya's keys: `change` of each (name, tensor), and tensors besides."""
    tensors = load_file(made[3] / "kohya" / diffusers_io.LORA_FILE)
    save_file(dict(change(*pair) for pair in tensors.items()) | more, file)
    return file


@pytest.mark.long
def test_diffusers_predicts_the_same_by_both_keys(made):
    name, source, _, folder = made
    pipeline = getattr(diffusers, torch_pipelines.PIPELINES[name][0]).from_pretrained(source)
    found = {"base": predict(pipeline, name)}
    for keys in ("own", "kohya"):
        pipeline.load_lora_weights(str(folder / keys))
        found[keys] = predict(pipeline, name)
        pipeline.unload_lora_weights()
    assert relative(found["kohya"], found["own"]) <= 1e-6
    assert relative(found["base"], found["own"]) > 0.05


def test_our_reader_gives_the_same_arrays(made):
    _, _, unet, folder = made
    want = diffusers_io.load_lora(folder / "own")
    assert_equal(diffusers_io.load_lora(folder / "kohya", model=unet), want)
    shapes = parameters.without_arrays(unet)
    assert_equal(diffusers_io.load_lora(folder / "kohya", model=shapes), want)


def test_alpha_and_both_spellings_are_read(made, tmp_path):
    """As kohya's scripts write: float16, an alpha of their own; of SDXL diffusers' paths too."""
    _, _, unet, folder = made
    respelt = {
        key: kohya.PREFIX + layer.replace(".", "_") for layer, key in kohya.written(unet).items()
    }

    def change(name, x):
        key, _, end = name.partition(".")
        x = torch.tensor(1.0) if end == "alpha" else x
        return f"{respelt[key]}.{end}", x.half()

    file = rewrite(made, tmp_path / "x.safetensors", change)
    got = diffusers_io.load_lora(file, model=unet)
    want = diffusers_io.load_lora(folder / "own")
    for path, x in want.items():
        half = x.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(got[path], half / (2 if ".lora_B." in path else 1))


@pytest.mark.long
@pytest.mark.parametrize("option", ["model.start", "model.reference"])
def test_a_start_in_kohya_keys_is_the_same_model(option, made):
    _, source, _, folder = made
    loaded = [
        diffusers_io.find_start(source, str(folder / keys), option=option).load()
        for keys in ("own", "kohya")
    ]
    assert_equal(*(parameters.split(model)[1] for model in loaded))


def test_diffusers_maps_every_key_of_sdxl_to_its_layer():
    """At full size: kohya's scripts say that they adapt 722 layers of its attention."""
    published = PUBLISHED["sdxl"]
    keys = kohya.written(parameters.abstract(published.family.model, published.model))
    assert len([layer for layer in keys if ".attentions." in layer]) == 722
    layers = list(keys)
    tensors = {}
    for i, key in enumerate(keys.values()):
        number = torch.full((1, 1), float(i))  # tells which layer a tensor was of
        tensors |= {f"{key}.lora_down.weight": number, f"{key}.lora_up.weight": number}
    found, *_ = StableDiffusionLoraLoaderMixin.lora_state_dict(
        tensors, unet_config=types.SimpleNamespace(layers_per_block=2)
    )
    found = convert_unet_state_dict_to_peft(found)
    assert len(found) == 2 * len(layers)
    for name, x in found.items():
        layer = name.removeprefix("unet.").replace(".processor", "").partition(".lora_")[0]
        assert layer == layers[int(x)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_te_text_model_x.lora_down.weight": 2}, "'lora_te_text_.*an adapter of a text enco"),
        ({"lora_te2_text_model_x.alpha": 1}, "'lora_te2_text_model_x.alpha', an adapter of a text"),
        ({"lora_unet_x.dora_scale": 2}, "'lora_unet_x', a layer that the model does not have"),
        ({"lora_unet_conv_in.dora_scale": (1, 4)}, r"\(1, 4\); DoRA is read with one magnitude"),
        ({"lora_unet_x.lora_down.weight": 2}, "'lora_unet_x', a layer that the model does not h"),
        ({"lora_unet_x.hada_w1_a": 2}, "'lora_unet_x.hada_w1_a'; only adapters of its unet"),
        ({"unet.conv_in.lora_A.weight": 2}, "the adapter of conv_in twice, by two names"),
    ],
)
def test_what_else_such_files_hold_is_refused(change, words, made, tmp_path):
    more = {name: torch.zeros(n) for name, n in change.items()}
    file = rewrite(made, tmp_path / "x.safetensors", lambda *pair: pair, **more)
    with pytest.raises(ValueError, match=words):
        diffusers_io.load_lora(file, model=made[2])


def test_other_models_have_no_such_keys(made):
    file = made[3] / "kohya"
    with pytest.raises(ValueError, match=r"read for UNets .SD 1, SD 2, SDXL., but .*a transformer"):
        diffusers_io.load_lora(file, component="transformer")
    with pytest.raises(ValueError, match="name the layers of a model: pass"):
        diffusers_io.load_lora(file)

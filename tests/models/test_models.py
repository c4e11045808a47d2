"""Parity of dmpo_jax.models with PyTorch diffusers and transformers, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dmpo_jax import diffusers_io
from dmpo_jax.models import parameters
from dmpo_jax.models.clip import CLIPTextModel
from dmpo_jax.models.flux2 import Flux2Transformer2DModel
from dmpo_jax.models.qwen3 import Qwen3Model
from dmpo_jax.models.sd3 import SD3Transformer2DModel
from dmpo_jax.models.t5 import T5EncoderModel
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.models.vae import AutoencoderKL
from dmpo_jax.models.z_image import ZImageTransformer2DModel
from tests.support import full_size, torch_models

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def nhwc(tensor) -> np.ndarray:
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def unet_inputs(model, size, seed=1):
    """The same inputs for both: (torch args, jax args), images NCHW and NHWC."""
    g = torch.Generator().manual_seed(seed)
    config = model.config
    sample = torch.randn(3, config.in_channels, *size, generator=g)
    timesteps = torch.tensor([0, 437, 999])
    context = torch.randn(3, 7, config.cross_attention_dim, generator=g)
    theirs = {"sample": sample, "timestep": timesteps, "encoder_hidden_states": context}
    ours = [nhwc(sample), timesteps.numpy(), context.numpy()]
    if config.addition_embed_type:
        pooled = torch.randn(3, 20, generator=g)
        time_ids = torch.tensor([[1024.0, 768, 0, 12, 1024, 1024]] * 3)
        theirs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
        ours += [pooled.numpy(), time_ids.numpy()]
    return theirs, [jnp.asarray(x) for x in ours]


GRADIENTS = ("small", "sd15", "sdxl")  # these are checked forward as well


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in torch_models.UNETS if n not in GRADIENTS])
def test_unet_forward(name, tmp_path):
    theirs = torch_models.unet(name)
    theirs.save_pretrained(tmp_path)
    structure, params = parameters.split(diffusers_io.load_unet(tmp_path))
    kwargs, args = unet_inputs(theirs, torch_models.UNETS[name][1])
    with torch.no_grad():
        want = nhwc(theirs(**kwargs).sample)
    got = jax.jit(lambda p, *a: parameters.merge(structure, p)(*a))(params, *args)
    assert relative_error(got, want) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize("name", GRADIENTS)
def test_unet_gradients(name, tmp_path):
    theirs = torch_models.unet(name)
    theirs.save_pretrained(tmp_path)
    structure, params = parameters.split(diffusers_io.load_unet(tmp_path))
    kwargs, args = unet_inputs(theirs, torch_models.UNETS[name][1])
    out = theirs(**kwargs).sample
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()

    def weighted(p, *a):
        prediction = parameters.merge(structure, p)(*a)
        return (prediction * nhwc(weight)).sum(), prediction

    got, prediction = jax.jit(jax.grad(weighted, has_aux=True))(params, *args)
    assert relative_error(prediction, nhwc(out)) <= 1e-5
    want = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
    assert {diffusers_io.torch_name(path) for path in got} == set(want)
    ours = {
        diffusers_io.torch_name(p): diffusers_io.to_torch(p, np.asarray(g)) for p, g in got.items()
    }
    order = sorted(want)
    flat = [np.concatenate([side[n].ravel() for n in order]) for side in (ours, want)]
    assert relative_error(*flat) <= 1e-4
    scale = np.linalg.norm(flat[1])
    for n in order:  # no single tensor may hide behind the large ones
        assert np.linalg.norm(ours[n] - want[n]) <= 1e-4 * max(
            np.linalg.norm(want[n]), 1e-3 * scale
        )


@pytest.mark.long
@pytest.mark.parametrize("name", torch_models.VAES)
def test_vae(name, tmp_path):
    theirs = torch_models.vae(name)
    theirs.save_pretrained(tmp_path)
    ours = diffusers_io.load_vae(tmp_path)
    images = torch.randn(
        2, 3, *torch_models.VAES[name][1], generator=torch.Generator().manual_seed(3)
    )
    with torch.no_grad():
        distribution = theirs.encode(images).latent_dist
        decoded = theirs.decode(distribution.mean).sample
    run = jax.jit(lambda x, z: (ours.encode(x), ours.decode(z)))
    moments, got = run(jnp.asarray(nhwc(images)), jnp.asarray(nhwc(distribution.mean)))
    channels = moments.shape[-1] // 2
    assert relative_error(moments[..., :channels], nhwc(distribution.mean)) <= 1e-5
    clipped = jnp.clip(moments[..., channels:], -30, 20)
    assert relative_error(clipped, nhwc(distribution.logvar)) <= 1e-5
    assert relative_error(got, nhwc(decoded)) <= 1e-5


@pytest.mark.parametrize("name", torch_models.CLIPS)
def test_text_encoder(name, tmp_path):
    theirs = torch_models.clip(name)
    theirs.save_pretrained(tmp_path)
    ours = diffusers_io.load_text_encoder(tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 96, (3, 12))
    for row, end in enumerate((4, 7, 11)):  # start, words, end, then padding with the end token
        ids[row, 0], ids[row, end:] = 97, 98
    with torch.no_grad():
        want = theirs(torch.tensor(ids), output_hidden_states=True)
    got = jax.jit(lambda x: ours(x))(jnp.asarray(ids))
    assert relative_error(got.last_hidden_state, want.last_hidden_state) <= 1e-5
    assert len(got.hidden_states) == len(want.hidden_states)
    for a, b in zip(got.hidden_states[:-1], want.hidden_states[:-1], strict=True):
        assert relative_error(a, b) <= 1e-5
    pooled = want.text_embeds if torch_models.CLIPS[name][1] else want.pooler_output
    assert relative_error(got.pooled, pooled) <= 1e-5


def test_attention_scores_are_float32_in_bfloat16():
    """Large logits that differ by less than bfloat16 resolves must still differ after softmax."""
    from dmpo_jax.models.attention import attention

    query = jnp.full((1, 1, 1, 4), 8.0, jnp.bfloat16)
    key = jnp.asarray([[[[8.0] * 4], [[8.0, 8.0, 8.0, 7.9375]]]], jnp.bfloat16)
    value = jnp.asarray([[[[1.0] * 4], [[0.0] * 4]]], jnp.bfloat16)
    got = attention(query, key, value)[0, 0, 0, 0]
    want = 1 / (1 + np.exp(-8 * 0.0625 / 2))
    np.testing.assert_allclose(float(got), want, rtol=5e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", full_size.MODELS)
def test_real_models_have_their_number_of_parameters(name):
    """Laid out abstractly, which takes seconds and no memory even for SDXL."""
    kind, config, count, _ = full_size.MODELS[name]
    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "sd3": SD3Transformer2DModel,
        "t5": T5EncoderModel,
        "flux2": Flux2Transformer2DModel,
        "z_image": ZImageTransformer2DModel,
        "qwen3": Qwen3Model,
    }
    kw = {} if kind in kinds else {"projection": kind == "clip_projection"}
    model = parameters.abstract(kinds.get(kind, CLIPTextModel), config, **kw)
    assert sum(spec.size for spec in parameters.shapes(model).values()) == count


def test_models_of_one_config_are_apart():
    """Their shapes are found once; what is done to one does not show in the next."""
    config = {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 4}
    config |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    one = parameters.abstract(UNet2DConditionModel, config)
    shapes = parameters.shapes(one)
    # A model's own config, a mapping that is no dict, describes it too.
    assert parameters.shapes(parameters.abstract(UNet2DConditionModel, one.config)) == shapes
    del one.conv_in
    one.conv_out.kernel = one.conv_out.bias
    config["block_out_channels"] = [8, 16]
    other = parameters.shapes(parameters.abstract(UNet2DConditionModel, config))
    assert other["conv_in.kernel"].shape == (3, 3, 4, 8)
    config["block_out_channels"] = [16, 32]
    again = parameters.abstract(UNet2DConditionModel, config)
    assert parameters.shapes(again) == shapes
    half = parameters.abstract(UNet2DConditionModel, config, param_dtype=jnp.bfloat16)
    assert {spec.dtype for spec in parameters.shapes(half).values()} == {jnp.dtype("bfloat16")}


@pytest.mark.long
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_separate(param_dtype, tmp_path):
    torch_models.unet("small").save_pretrained(tmp_path)
    for dtype in (jnp.float32, jnp.bfloat16):
        ours = diffusers_io.load_unet(tmp_path, dtype=dtype, param_dtype=param_dtype)
        assert {p.dtype for p in parameters.split(ours)[1].values()} == {jnp.dtype(param_dtype)}
        out = jax.eval_shape(
            lambda ours: ours(jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, int), jnp.zeros((1, 5, 24))),
            ours,
        )
        assert out.dtype == dtype

"""Parity of FLUX.2's transformer and VAE with PyTorch diffusers."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dmpo_jax import diffusers_io, families
from dmpo_jax.diffusion.noise import restore_latents, sample_latents
from dmpo_jax.families import flux2 as family
from dmpo_jax.models import parameters
from dmpo_jax.models.execution import Execution
from dmpo_jax.models.flux2 import Flux2Transformer2DModel
from dmpo_jax.models.vae import AutoencoderKLFlux2
from dmpo_jax.types import Condition
from tests.support import parity
from tests.support.torch_models import randomise

CONFIG = {
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "axes_dims_rope": (2, 4, 4, 6),
    "guidance_embeds": False,
}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 6,
}


def inputs(channels, height, width, words=7):
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    times = np.array([3.0, 437.0, 1000.0], np.float32)
    return normal(3, height, width, channels), times, normal(3, words, 20)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (3, 5)),
        (
            {
                "guidance_embeds": True,
                "out_channels": 8,
                "mlp_ratio": 2.5,
                "num_layers": 1,
                "num_single_layers": 1,
            },
            (4, 2),
        ),
    ],
)
def test_outputs_and_gradients_are_those_of_pytorch(changes, size, tmp_path):
    theirs = randomise(diffusers.Flux2Transformer2DModel(**{**CONFIG, **changes}))
    theirs.save_pretrained(tmp_path)
    latents, times, context = inputs(CONFIG["in_channels"], *size)
    told = family.torch_inputs(latents, times, Condition(context))
    told = jax.tree.map(torch.tensor, told)
    args = (latents, times / 1000, context)
    if changes:
        guidance = np.array([1.0, 3.5, 4.0], np.float32)
        told["guidance"], args = torch.tensor(guidance), (*args, guidance)
    out = theirs(**told).sample
    out = out.reshape(3, *size, -1).permute(0, 3, 1, 2)
    parity.check(theirs, tmp_path, tuple(map(jnp.asarray, args)), out)
    parity.check_files(tmp_path, tmp_path / "again")


@pytest.mark.long
def test_scan_and_remat_change_nothing():
    config = {**CONFIG, "num_layers": 2, "num_single_layers": 3}
    model = parameters.initialise(Flux2Transformer2DModel, config, 0)
    structure, params = parameters.split(model)
    latents, times, context = map(jnp.asarray, inputs(CONFIG["in_channels"], 3, 4))

    def run(how):
        def loss(params):
            model = parameters.merge(structure, params)
            model.execution = how
            return (model(latents, times / 1000, context) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    want, wanted = run(Execution())
    got, gradient = run(Execution(scan=True, remat="block"))
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    for path, g in wanted.items():
        bound = 2e-5 * np.abs(g).max()
        np.testing.assert_allclose(gradient[path], g, atol=bound, err_msg=path)


def test_vae_and_the_factors_of_its_latents_are_those_of_pytorch(tmp_path):
    theirs = randomise(diffusers.AutoencoderKLFlux2(**VAE))
    generator = torch.Generator().manual_seed(4)
    theirs.bn.running_mean.copy_(torch.randn(24, generator=generator))
    theirs.bn.running_var.copy_(torch.rand(24, generator=generator) + 0.2)
    theirs.save_pretrained(tmp_path / "vae")
    ours = diffusers_io.load_vae(tmp_path)
    assert isinstance(ours, AutoencoderKLFlux2)
    images = torch.randn(2, 3, 8, 12, generator=generator)
    with torch.no_grad():
        mean = theirs.encode(images).latent_dist.mode()
        decoded = theirs.decode(mean).sample
        packed = diffusers.Flux2KleinPipeline._patchify_latents(mean)
        variance = theirs.bn.running_var.view(1, -1, 1, 1) + theirs.config.batch_norm_eps
        scaled = (packed - theirs.bn.running_mean.view(1, -1, 1, 1)) / variance.sqrt()
    nhwc = lambda x: x.permute(0, 2, 3, 1).numpy()  # noqa: E731
    run = jax.jit(lambda x, z: (ours.encode(x), ours.decode(z)))
    moments, got = run(nhwc(images), nhwc(mean))
    assert parity.relative_error(moments[..., :6], nhwc(mean)) <= 1e-5
    assert parity.relative_error(got, nhwc(decoded)) <= 1e-5
    scaling, shift = family.factors(ours)
    told = {"scaling_factor": scaling, "shift_factor": shift, "pack": 2}
    latents = sample_latents(jax.random.key(0), moments[..., :6], mean_only=True, **told)
    assert parity.relative_error(latents, nhwc(scaled)) <= 1e-5
    assert parity.relative_error(restore_latents(latents, **told), nhwc(mean)) <= 1e-5
    parity.check_files(
        tmp_path / "vae", tmp_path / "again", diffusers_io.load_vae, diffusers_io.save_vae
    )


def test_published_models_have_their_number_of_parameters():
    for name, count in (("klein_4b", 3_875_544_576), ("klein_9b", 9_078_581_248)):
        model = parameters.abstract(Flux2Transformer2DModel, families.PUBLISHED[name].model)
        assert sum(x.size for x in parameters.shapes(model).values()) == count
    vae = parameters.shapes(parameters.abstract(AutoencoderKLFlux2, {}))
    assert sum(x.size for x in vae.values()) == 84_046_115 + 2 * 128


def test_the_shift_is_that_of_the_pipeline():
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    for tokens in (16, 1024, 4096, 4300, 4301, 8192):
        for steps in (1, 4, 50, 200):
            want = compute_empirical_mu(tokens, steps)
            assert family.empirical_mu(tokens, steps) == pytest.approx(want, rel=1e-12)


@pytest.mark.long
def test_a_sharded_model_computes_the_same(monkeypatch):
    config = {**CONFIG, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1}
    model = parameters.initialise(Flux2Transformer2DModel, config, 0)
    rng = np.random.default_rng(1)
    latents, context = (rng.standard_normal(s, np.float32) for s in ((4, 2, 3, 12), (4, 5, 20)))
    args = (latents, np.linspace(0.1, 1, 4, dtype=np.float32), context)
    parity.check_sharded(model, args, monkeypatch)


def test_rules_are_the_layers_own():
    targets = ("to_q", "to_out.0", "to_add_out", "linear_out", "to_qkv_mlp_proj", "attn.to_out")
    parity.check_rules(parameters.abstract(Flux2Transformer2DModel, CONFIG), targets)

"""Layers that several models share, against PyTorch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dmpo_jax.models import lora, quantised
from dmpo_jax.models.layers import Linear, RMSNorm, activation, modulated_norm

LARGE = np.random.default_rng(0).normal(size=(2, 3, 5, 16)).astype(np.float32) * 300


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
def test_rms_norm(epsilon):
    theirs = torch.nn.RMSNorm(16, eps=epsilon)
    with torch.no_grad():
        theirs.weight.copy_(torch.linspace(-1, 2, 16))
    ours = RMSNorm(16, epsilon=epsilon, rngs=nnx.Rngs(0))
    ours.scale[...] = jnp.asarray(theirs.weight.detach().numpy())
    for x in (LARGE, LARGE * 1e-5):
        given = torch.tensor(x, requires_grad=True)
        want = theirs(given)
        (want**2).sum().backward()
        np.testing.assert_allclose(ours(jnp.asarray(x)), want.detach(), rtol=2e-6, atol=1e-6)
        slope = jax.grad(lambda x: (ours(x) ** 2).sum())(jnp.asarray(x))
        scale = given.grad.abs().max().item()
        np.testing.assert_allclose(slope, given.grad, rtol=1e-4, atol=1e-6 * scale)


def test_rms_norm_computes_its_statistics_in_float32():
    """Squares of 300 sum to what bfloat16 holds to two digits."""
    ours = RMSNorm(16, epsilon=1e-6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    got = ours(jnp.asarray(LARGE, jnp.bfloat16))
    rounded = np.asarray(jnp.asarray(LARGE, jnp.bfloat16), np.float32)
    want = rounded / np.sqrt((rounded**2).mean(-1, keepdims=True) + 1e-6)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.asarray(want, jnp.bfloat16))


@pytest.mark.parametrize("size", [300.0, 1e-3])  # at the second one epsilon counts
def test_modulated_norm(size):
    rng = np.random.default_rng(0)
    x = (size * rng.normal(size=(2, 5, 16)) + size).astype(np.float32)
    shift, scale = rng.normal(size=(2, 2, 16)).astype(np.float32)
    normed = torch.nn.functional.layer_norm(torch.tensor(x), (16,), eps=1e-6).numpy()
    want = normed * (1 + scale[:, None]) + shift[:, None]
    got = modulated_norm(*map(jnp.asarray, (x, shift, scale)), 1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh"), ("gelu-approximate", "tanh")]
)
def test_gelu(name, approximate):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    want = torch.nn.functional.gelu(torch.tensor(x), approximate=approximate)
    np.testing.assert_allclose(activation(name)(jnp.asarray(x)), want, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("silu", torch.nn.functional.silu),
        ("mish", torch.nn.functional.mish),
        ("gelu", torch.nn.functional.gelu),
        ("gelu_tanh", functools.partial(torch.nn.functional.gelu, approximate="tanh")),
    ],
)
def test_activations_in_bfloat16_are_rounded_once(name, theirs):
    x = torch.linspace(-2, 6, 1001).to(torch.bfloat16)  # below, tails of GELU cancel
    want = theirs(x.double()).to(torch.bfloat16).float().numpy()
    got = jax.jit(activation(name))(jnp.asarray(x.float().numpy(), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


@pytest.mark.parametrize("kind", ["plain", "adapted", "int8"])
def test_a_linear_layer_in_parts_is_its_output_cut(kind):
    model = {"enter": Linear(32, 48, rngs=nnx.Rngs(0))}
    model["enter"].bias[...] = jnp.linspace(-1, 1, 48)
    layer = nnx.Dict(model)
    if kind == "adapted":
        layer = lora.attach(layer, rank=2, alpha=4, targets=["enter"], seed=0)
        up = layer["enter"].lora_B.kernel
        up[...] = jnp.linspace(-1, 1, up.size).reshape(up.shape)
    if kind == "int8":
        layer["enter"].kernel.set_value(quantised.quantise(layer["enter"].kernel[...]))
    layer, x = layer["enter"], jnp.asarray(LARGE[..., :2].reshape(3, 5, 4), jnp.float32)
    x = jnp.tile(x, (1, 1, 8)) / 300

    def cut(x):
        return jnp.split(layer(x), [8, 24], axis=-1)

    def parts(x):
        return list(layer.parts(x, (8, 16, 24)))

    def loss(of, x):
        return sum((i + 1) * jnp.sin(y).sum() for i, y in enumerate(of(x)))

    for got, want in zip(parts(x), cut(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    got, want = (jax.grad(functools.partial(loss, of))(x) for of in (parts, cut))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

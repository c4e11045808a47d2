"""Layers that several models share, against PyTorch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dmpo_jax.models import layers, lora, parameters, quantised
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


@pytest.fixture(params=["cpu", "gpu"])
def compiled_for(request, monkeypatch):
    """The layers as they are written for a platform, all run on the CPU."""
    monkeypatch.setattr(layers, "platform", lambda: request.param)


def _agree(ours, theirs, x, **given):
    """Values and gradients of x and of `given`, against PyTorch's in float64."""
    want = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in given.items()}
    wide = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    weights = np.cos(np.arange(x.size)).reshape(x.shape)
    out = theirs(wide, **want)
    (torch.tensor(weights) * out).sum().backward()

    def weighted(x, given):
        return (jnp.asarray(weights, jnp.float32) * ours(x, **given)).sum()

    given = {name: jnp.asarray(value) for name, value in given.items()}
    x = jnp.asarray(x)
    np.testing.assert_allclose(ours(x, **given), out.detach(), rtol=1e-5, atol=1e-5)
    of_x, of_given = jax.jit(jax.grad(weighted, (0, 1)))(x, given)
    for got, leaf in ((of_x, wide), *((of_given[name], want[name]) for name in given)):
        scale = leaf.grad.abs().max().item()
        np.testing.assert_allclose(got, leaf.grad, rtol=1e-4, atol=2e-5 * scale)


def _applied(norm):
    """Returns the norm as a function of its parameters too."""
    structure, _ = parameters.split(norm)

    def apply(x, weight, bias):
        return parameters.merge(structure, {"scale": weight, "bias": bias})(x)

    return apply


def _affine(width):
    return {"weight": np.linspace(-1, 2, width, dtype=np.float32), "bias": np.ones(width, "f4")}


@pytest.mark.parametrize("size", [300.0, 1e-3])  # at the second one epsilon counts
def test_modulated_norm(size, compiled_for):
    rng = np.random.default_rng(0)
    x = (size * rng.normal(size=(2, 5, 16)) + size).astype(np.float32)
    shift, scale = rng.normal(size=(2, 2, 16)).astype(np.float32)

    def theirs(x, shift, scale):
        normed = torch.nn.functional.layer_norm(x, (16,), eps=1e-6)
        return normed * (1 + scale[:, None]) + shift[:, None]

    ours = functools.partial(modulated_norm, epsilon=1e-6)
    _agree(ours, theirs, x, shift=shift, scale=scale)


@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 5, 16)])
def test_layer_norm(shape, compiled_for):
    x = 30 + np.random.default_rng(0).normal(size=shape).astype(np.float32)
    norm = layers.layer_norm(16, rngs=nnx.Rngs(0))

    def theirs(x, **kw):
        return torch.nn.functional.layer_norm(x, (16,), **kw)

    _agree(_applied(norm), theirs, x, **_affine(16))


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("shape", [(2, 4, 6, 16), (2, 24, 16)])
def test_group_norm(shape, act):
    """At mean 30, deviation 1, the mean of squares less the square of the mean would show."""
    x = 30 + np.random.default_rng(0).normal(size=shape).astype(np.float32)
    norm = layers.group_norm(16, 4, 1e-5, act, rngs=nnx.Rngs(0))

    def theirs(x, **kw):
        normed = torch.nn.functional.group_norm(x.movedim(-1, 1), 4, eps=1e-5, **kw)
        return (torch.nn.functional.silu(normed) if act else normed).movedim(1, -1)

    _agree(_applied(norm), theirs, x, **_affine(16))


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


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("kind", ["plain", "adapted", "int8"])
def test_a_linear_layer_in_parts_is_its_output_cut(kind, platform, monkeypatch):
    monkeypatch.setattr(layers, "platform", lambda: platform)
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

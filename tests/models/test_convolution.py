"""Our convolution equals XLA's, values and gradients, whatever it is computed by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from dmpo_jax.models import convolution
from dmpo_jax.models.convolution import convolution as conv

SAME, RIGHT, NONE = ((1, 1), (1, 1)), ((0, 1), (0, 1)), ((0, 0), (0, 0))


def lax_conv(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def dots_and_convolutions(f, *args) -> list[str]:
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    return [
        str(e.primitive)
        for e in jaxpr.eqns
        if "dot" in str(e.primitive) or "conv_" in str(e.primitive)
    ]


@pytest.mark.parametrize(
    ("size", "taps", "strides", "padding"),
    [
        ((4, 4), 3, (1, 1), SAME),
        ((5, 7), 3, (1, 1), SAME),
        ((1, 1), 3, (1, 1), SAME),  # eight taps of nine meet padding alone
        ((1, 3), 3, (2, 2), SAME),
        ((5, 4), 3, (2, 2), SAME),
        ((6, 5), 3, (2, 2), RIGHT),
        ((1, 1), 3, (2, 2), ((1, 1), (0, 2))),
        ((3, 5), 1, (1, 1), NONE),
        ((4, 5), 1, (2, 1), NONE),
        ((5, 6), 3, (2, 2), "SAME"),
        ((6, 7), 5, (1, 3), ((2, 0), (0, 3))),
    ],
)
def test_equals_xlas(size, taps, strides, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(taps, taps, 3, 4)), jnp.float32)
    assert dots_and_convolutions(lambda x, k: conv(x, k, strides, padding), x, kernel) == [
        "dot_general"
    ]

    def with_gradients(f):
        out, vjp = jax.vjp(lambda x, kernel: f(x, kernel, strides, padding), x, kernel)
        return out, vjp(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    got, want = (jax.jit(lambda f=f: with_gradients(f))() for f in (conv, lax_conv))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_many_pixels_stay_a_convolution():
    kernel = jnp.ones((3, 3, 2, 2))
    few = jnp.ones((1, 16, 16, 2))
    assert few.shape[1] * few.shape[2] == convolution.FEW_PIXELS

    def kinds(x):
        return dots_and_convolutions(lambda x: conv(x, kernel, (1, 1), SAME), x)

    assert kinds(few) == ["dot_general"]
    assert kinds(jnp.ones((2, 16, 16, 2))) == ["conv_general_dilated"]


def test_other_platforms_keep_the_convolution():
    """Also where a CPU host compiles for them: the mesh says so, not the host."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        kinds = dots_and_convolutions(
            lambda x, k: conv(x, k, (1, 1), SAME), jnp.ones((1, 2, 2, 2)), jnp.ones((3, 3, 2, 2))
        )
    assert kinds == ["conv_general_dilated"]

"""Every kernel equals the plain one, forward and backward, alone and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.mesh import make_mesh
from dmpo_jax.models import attention as module
from dmpo_jax.models.attention import attention, best_kernel, takes_cudnn, takes_splash


@pytest.fixture
def short_splash(monkeypatch):
    """Interpreted, the kernel is slow: let it take 256 tokens."""
    monkeypatch.setattr(module, "SPLASH_FROM", 256)


def tokens(batch=2, length=256, heads=2, width=40, dtype=jnp.bfloat16, keys=None):
    """query, key, value and a cotangent of the output."""
    rng = np.random.default_rng(0)
    lengths = (length, keys or length, keys or length, length)
    return [jnp.asarray(rng.normal(size=(batch, t, heads, width)), dtype) for t in lengths]


def both_ways(kernel, query, key, value, cotangent):
    """The output and the gradients of query, key and value, as float32."""

    @jax.jit
    def run(*inputs):
        out, backward = jax.vjp(lambda *x: attention(*x, kernel=kernel), *inputs)
        return out, *backward(cotangent)

    return [np.asarray(x, np.float32) for x in run(query, key, value)]


def relative_errors(got, want):
    return [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("width", [40, 64, 160])
def test_splash_is_plain_within_bfloat16(short_splash, width):
    inputs = tokens(width=width)
    assert takes_splash(*inputs[:2], None)
    exact = both_ways("plain", *(x.astype(jnp.float32) for x in inputs))
    plain = relative_errors(both_ways("plain", *inputs), exact)
    got = relative_errors(both_ways("splash", *inputs), exact)
    print(plain, got)
    assert max(got) < 2**-6

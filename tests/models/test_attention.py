"""Every kernel equals the plain one, forward and backward, alone and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dmpo_jax.models import attention as module
from dmpo_jax.models.attention import (
    RESIDUALS,
    attention,
    best_kernel,
    takes_cudnn,
    takes_splash,
)
from dmpo_jax.parallel import jax_internals


@pytest.fixture
def short_splash(monkeypatch):
    """Interpreted, the kernel is slow: let it take 256 tokens, in several blocks."""
    monkeypatch.setattr(module, "SPLASH_FROM", 256)
    monkeypatch.setattr(module, "BLOCK", 128)
    monkeypatch.setattr(module, "BLOCK_BACKWARD", 128)
    monkeypatch.setattr(module, "PADDED_TO", 384)


def tokens(batch=1, length=256, heads=2, width=40, *, keys=None, dtype=jnp.bfloat16):
    """query, key, value and a cotangent of the output."""
    rng = np.random.default_rng(0)
    lengths = (length, keys or length, keys or length, length)
    return [jnp.asarray(rng.normal(size=(batch, t, heads, width)), dtype) for t in lengths]


def both_ways(kernel, inputs, wrap=lambda f: f):
    """The output and the gradients of query, key and value, as float32."""

    def run(*inputs):
        *inputs, cotangent = inputs
        out, backward = jax.vjp(wrap(functools.partial(attention, kernel=kernel)), *inputs)
        return out, *backward(cotangent)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(*inputs)]


def relative_errors(got, want):
    return [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, want, strict=True)]


def within_bfloat16(kernel, inputs):
    """Against plain in float32: a few roundings to bfloat16's 8 bits, as plain has there too."""
    exact = both_ways("plain", [x.astype(jnp.float32) for x in inputs])
    assert max(relative_errors(both_ways("plain", inputs), exact)) <= 2**-7
    assert max(relative_errors(both_ways(kernel, inputs), exact)) <= 2**-7


@pytest.mark.parametrize("width", [40, 64])
def test_splash_is_plain_within_bfloat16(short_splash, width):
    inputs = tokens(width=width)
    assert takes_splash(*inputs[:2])
    within_bfloat16("splash", inputs)


def test_splash_pads_tokens_that_it_cannot_cut_in_blocks(short_splash):
    """SD3's image and text together: 4,429. Nothing attends to the padding, nor gets gradients."""
    inputs = tokens(length=301)
    assert takes_splash(*inputs[:2])
    within_bfloat16("splash", inputs)


def test_many_scores_are_made_in_parts(monkeypatch):
    """Of plain: the same output and gradients as with all of them at once."""
    inputs = tokens(batch=2, length=96, keys=40, dtype=jnp.float32)
    lengths = jnp.asarray([40, 7])

    def run(inputs):
        wrap = functools.partial(functools.partial, lengths=lengths)
        return both_ways("plain", inputs, wrap), both_ways("plain", inputs)

    whole = run(inputs)
    monkeypatch.setattr(module, "MOST_SCORES", 12 * 40)  # an eighth
    for got, want in zip(run(inputs), whole, strict=True):
        assert max(relative_errors(got, want)) <= 1e-6


def test_the_scores_of_large_images_are_never_all_in_memory():
    """Of a VAE at 1,024 px: 268 million an image, 1,074 MB, and their softmax."""
    shape = jax.ShapeDtypeStruct((2, 16384, 1, 64), jnp.float32)
    program = jax.jit(attention).lower(shape, shape, shape).compile()
    assert program.memory_analysis().temp_size_in_bytes < 400e6


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on a GPU")
@pytest.mark.parametrize(("width", "keys"), [(40, None), (64, None), (64, 77), (128, 77)])
def test_cudnn_is_plain_within_bfloat16(width, keys):
    inputs = tokens(batch=2, width=width, keys=keys)
    assert takes_cudnn(*inputs[:2])
    within_bfloat16("cudnn", inputs)


@pytest.mark.parametrize("kernel", ["plain", "splash"])
def test_goes_through_scan_and_checkpoint(short_splash, kernel):
    """As the UNet's blocks run: rematerialised in a loop; the kernel's own results may be kept."""
    inputs = tokens(length=256, heads=1)
    policy = jax.checkpoint_policies.save_only_these_names(RESIDUALS)

    def twice(attend, query, key, value):
        def block(x, _):
            return attend(x, key, value), None

        return jax.lax.scan(block, query, length=2)[0]

    want = both_ways(kernel, inputs, lambda f: functools.partial(twice, f))
    for kept in (None, policy):
        blocks = functools.partial(jax.checkpoint, policy=kept)
        got = both_ways(kernel, inputs, lambda f, b=blocks: functools.partial(twice, b(f)))
        # The loop's carried gradients are rounded where XLA fuses differently.
        assert max(relative_errors(got, want)) <= 2**-8


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "names", "batch"),
    [
        ((2, 2, 2), ("data", "fsdp", "tensor"), 4),
        ((4, 2), ("data", "fsdp"), 8),
        ((4, 2), ("fsdp", "tensor"), 4),
    ],
)
def test_a_mesh_changes_nothing(short_splash, shape, names, batch):
    inputs = tokens(batch=batch)
    want = both_ways("splash", inputs)
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    rows = tuple(n for n in names if n != "tensor")
    split = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec(rows)))
    with jax.set_mesh(mesh):
        got = both_ways("splash", split)
    assert max(relative_errors(got, want)) <= 1e-6


@pytest.mark.parametrize(
    ("sizes", "batch", "heads", "spec"),
    [
        ({"data": 2, "fsdp": 4, "tensor": 2}, 8, 8, (("data", "fsdp"), None, ("tensor",))),
        ({"data": 1, "fsdp": 4}, 8, 5, (("fsdp",), None, None)),
        ({"data": 1, "fsdp": 1, "tensor": 1}, 3, 5, ()),
        ({}, 3, 5, ()),
        ({"data": 2, "tensor": 2}, 8, 5, None),  # SD2's five heads on two devices
        ({"data": 8}, 3, 8, None),
        ({"data": 2, "stage": 2}, 8, 8, None),
    ],
)
def test_batch_and_heads_are_split_where_they_divide(sizes, batch, heads, spec):
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    want = None if spec is None else PartitionSpec(*spec)
    assert module._split(mesh, batch, heads) == want


def test_each_device_has_its_rows_and_heads(short_splash, monkeypatch):
    """The same arrays reach cuDNN, for which XLA's implementation stands in."""
    seen = []

    def kernel(query, key, value, key_value_seq_lengths, implementation):
        assert key_value_seq_lengths is None
        seen.append((query.shape, key.shape, implementation))
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    monkeypatch.setattr(module.placement, "platform", lambda: "gpu")
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    query, key, value, _ = tokens(batch=4, keys=78)
    with jax.set_mesh(mesh):
        jax.eval_shape(functools.partial(attention, kernel="cudnn"), query, key, value)
    assert seen == [((1, 256, 1, 40), (1, 78, 1, 40), "cudnn")]


@pytest.mark.parametrize(("length", "keys"), [(256, 77), (77, 77), (77, 256), (256, 256)])
def test_jax_differentiates_what_cudnn_is_given(length, keys, monkeypatch):
    """JAX's own checks of shapes, which run without a GPU: it refuses odd token counts."""
    monkeypatch.setattr(module.placement, "platform", lambda: "gpu")
    inputs = tokens(length=length, keys=keys)
    assert takes_cudnn(*inputs[:2])
    attend = functools.partial(attention, kernel="cudnn")
    with jax_internals.assumed_cudnn(91200):
        made = jax.eval_shape(lambda *x: jax.vjp(attend, *x[:3])[1](x[3]), *inputs)
    assert [x.shape for x in made] == [x.shape for x in inputs[:3]]


@pytest.mark.parametrize("lengths", [None, (77, 30)])
def test_a_token_of_padding_for_cudnn_changes_nothing(lengths, monkeypatch):
    """XLA's implementation stands in for cuDNN's, with the same arguments."""
    function = jax.nn.dot_product_attention

    def kernel(*args, implementation, **rest):
        assert args[0].shape[1] % 2 == args[1].shape[1] % 2 == 0
        return function(*args, implementation="xla", **rest)

    given = None if lengths is None else jnp.array(lengths)
    inputs = tokens(batch=2, length=33, keys=77)

    def run(kernel, inputs):
        attend = functools.partial(attention, lengths=given, kernel=kernel)
        out, backward = jax.vjp(attend, *inputs[:3])
        return [x.astype(jnp.float32) for x in (out, *backward(inputs[3]))]

    want = run("plain", [x.astype(jnp.float32) for x in inputs])
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    monkeypatch.setattr(module.placement, "platform", lambda: "gpu")
    got = run("cudnn", inputs)
    assert [x.shape for x in got] == [x.shape for x in want]
    assert max(relative_errors(got, want)) <= 2**-7


@pytest.mark.parametrize(
    ("inputs", "cudnn", "splash"),
    [
        ({"length": 4096, "width": 40}, True, True),  # SD1.5 at 512²
        ({"length": 4096, "width": 64, "heads": 10}, True, True),  # SDXL at 1024²
        ({"length": 4096, "width": 40, "keys": 77}, True, False),  # its prompt
        ({"length": 1024, "width": 80}, True, True),  # a level further down
        ({"length": 512, "width": 80}, True, False),
        ({"length": 256, "width": 160}, False, False),  # SD1.5's lowest level
        ({"length": 3952, "width": 64}, True, True),  # 832 x 1216: no multiple of 128
        ({"length": 4096 + 333, "width": 64}, True, True),  # SD3 at 1024², with its text
        ({"length": 4096, "width": 40, "dtype": jnp.float32}, False, False),
        ({"length": 4096, "width": 40, "dtype": jnp.float16}, True, False),
        ({"length": 4096, "width": 36}, False, True),
        ({"length": 4096, "width": 512, "heads": 1}, False, False),  # the VAE's
    ],
)
def test_kernels_take_what_they_can(inputs, cudnn, splash):
    query, key, *_ = jax.eval_shape(lambda: tuple(tokens(**inputs)))
    assert takes_cudnn(query, key) is cudnn
    assert takes_splash(query, key) is splash
    mask = jax.ShapeDtypeStruct((4096, 4096), jnp.bool_)
    assert not takes_cudnn(query, key, mask)
    assert not takes_splash(query, key, mask)


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_what_a_kernel_does_not_take_is_plain(kernel):
    """To the bit, on any device."""
    inputs = tokens(length=16, keys=7, dtype=jnp.float32)
    for got, want in zip(both_ways(kernel, inputs), both_ways("plain", inputs), strict=True):
        np.testing.assert_array_equal(got, want)


def test_best_kernel():
    platforms = ("tpu", "gpu", "cuda", "cpu", "rocm")
    assert [best_kernel(p) for p in platforms] == ["splash", "cudnn", "cudnn", "plain", "plain"]


def test_refusals():
    inputs = tokens(length=8)[:3]
    with pytest.raises(ValueError, match=r"one of .*'splash'.* but got 'flash'"):
        attention(*inputs, kernel="flash")
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match=r"needs NVIDIA GPUs.*use 'plain'"):
            attention(*inputs, kernel="cudnn")


def test_keys_behind_a_rows_length_are_not_attended_to(short_splash):
    """In plain attention as if they were not there; in splash as in plain."""
    *inputs, cotangent = tokens(batch=2, dtype=jnp.float32)
    lengths = jnp.array([256, 100])
    valid = (jnp.arange(256)[None] < lengths[:, None])[..., None, None]

    def run(kernel, inputs, lengths, cotangent):
        attend = functools.partial(attention, lengths=lengths, kernel=kernel)
        out, backward = jax.vjp(attend, *inputs)
        return out, *backward(cotangent)

    # What is behind is read by nobody.
    got = run("plain", inputs, lengths, cotangent * valid)
    for row, length in enumerate((256, 100)):
        alone = [x[row : row + 1, :length] for x in (*inputs, cotangent)]
        want = run("plain", alone[:3], None, alone[3])
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a[row, :length], b[0], atol=1e-5)
    half = [x.astype(jnp.bfloat16) for x in (*inputs, cotangent * valid)]
    assert takes_splash(*half[:2])
    fast = [x.astype(jnp.float32) for x in run("splash", half[:3], lengths, half[3])]
    exact = [x.astype(jnp.float32) for x in half]
    slow = run("plain", exact[:3], lengths, exact[3])
    assert max(relative_errors([x * valid for x in fast], [x * valid for x in slow])) <= 2**-7
    assert not np.asarray(fast[2] * ~valid).any()  # nor do their keys get a gradient

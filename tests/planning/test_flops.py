"""FLOPs counted from traced programs, and the full-size models' known numbers."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dmpo_jax.data.encoded.meta import EncodedMeta
from dmpo_jax.families import KLEIN, PUBLISHED, SD, SD3, SDXL, SDXL_EDIT, Z_IMAGE
from dmpo_jax.models import attention, lora, parameters
from dmpo_jax.parallel import jax_internals
from dmpo_jax.planning import flops
from dmpo_jax.toy import debug
from dmpo_jax.types import Condition

TOKENS = 5
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1")
FAMILIES = {
    "sd": SD,
    "sdxl": SDXL,
    "sdxl_edit": SDXL_EDIT,
    "sd3": SD3,
    "klein": KLEIN,
    "z_image": Z_IMAGE,
}


def make(family, size=(8, 8)):
    """(abstract model, meta) of a family's tiny model."""
    config = debug.model_config(family)
    meta = EncodedMeta.expected(
        family,
        family.facts(config),
        size=size,
        latent_channels=debug.vae_config(family)["latent_channels"],
        tokens=TOKENS,
        scaling_factor=1.0,
        moments_dtype="float32",
    )
    return parameters.abstract(family.model, config), meta


def trace(family, model, meta, *, to: str) -> int:
    """FLOPs of the jaxpr of one image's forward, or of it and a backward, as a TPU runs them.

    to: "none", "all" (of parameters and every input), or "adapters".
    """
    structure, params = parameters.split(parameters.without_arrays(model))
    predict = family.make_predict(functools.partial(parameters.merge, structure))
    frozen, adapters = lora.partition(params)
    told = meta.abstract_batch(1).condition
    told = Condition(
        **{
            name: None
            if x is None
            else jax.ShapeDtypeStruct(x.shape, x.dtype if name == "lengths" else jnp.float32)
            for name, x in told._asdict().items()
        }
    )

    def forward(adapters, frozen, latents, times, told):
        return predict({**frozen, **adapters}, latents, times, told.per_image(1)).sum()

    wanted = {"none": None, "all": (0, 1, 2, 3, 4), "adapters": (0,)}[to]
    program = forward if wanted is None else jax.grad(forward, wanted)
    latents = jax.ShapeDtypeStruct((1, *meta.latents), jnp.float32)
    times = jax.ShapeDtypeStruct((1,), jnp.float32)
    with jax.sharding.use_abstract_mesh(flops._one_tpu()):
        return flops.jaxpr_flops(jax.make_jaxpr(program)(adapters, frozen, latents, times, told))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("sd", (9, 10)),
        ("sdxl", (7, 10)),
        ("sdxl_edit", (8, 8)),
        ("sd3", (8, 12)),
        ("klein", (8, 12)),
        ("z_image", (8, 12)),
    ],
)
def test_a_forward_is_counted_whatever_its_execution(name, size):
    """Blocks as loops, as they are counted, are as many FLOPs as blocks one after another."""
    family = FAMILIES[name]
    model, meta = make(family, size)
    before = model.execution
    counted = flops.forward_flops(family, model, meta)
    assert counted.total == trace(family, model, meta, to="none")
    assert counted.weights > counted.attention > 0
    assert counted.adapters == 0
    assert model.execution == before


@pytest.mark.long
@pytest.mark.parametrize("name", ["sdxl", "sd3", "klein"])
def test_a_backward_is_twice_a_forward(name):
    """To the last FLOP, with the gradients of inputs, which a step is spared."""
    family = FAMILIES[name]
    model, meta = make(family)
    one = flops.forward_flops(family, model, meta)
    counted = flops.step_flops(one, needs_reference=False, needs_rejected=False)
    assert counted == 3 * one.total
    assert counted == trace(family, model, meta, to="all")


@pytest.mark.long
def test_adapters():
    """The forward exactly; the backward short of what lies before the first adapter."""
    model, meta = make(SD)
    plain = flops.forward_flops(SD, model, meta)
    adapted = lora.attach(model, rank=3, alpha=3, targets=TARGETS, seed=0)
    one = flops.forward_flops(SD, adapted, meta)
    assert one[:2] == plain[:2]
    assert one.total == trace(SD, adapted, meta, to="none")
    counted = flops.step_flops(one, needs_reference=False, needs_rejected=False, lora=True)
    # Small as they are, these models spend far more on their edges than full-size ones.
    assert counted == pytest.approx(trace(SD, adapted, meta, to="adapters"), rel=0.15)
    assert counted < flops.step_flops(one, needs_reference=False, needs_rejected=False)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "forward", "pair"),
    [
        ("sd15", 0.8033, 6.426),
        ("sdxl", 6.7612, 54.09),
        ("sd35_medium", 11.2495, 89.996),  # as PyTorch's FlopCounterMode counts it, too
        ("sd35_large", 31.1211, 248.969),
        ("klein_4b", 10.1730, 81.384),
        ("z_image", 18.5334, 148.267),
    ],
)
def test_full_size(name, forward, pair):
    """TFLOP, as counted by hand from the published models."""
    published = PUBLISHED[name]
    family, facts = published.family, published.family.facts(published.model)
    meta = EncodedMeta.expected(
        family,
        facts,
        size=facts.latent_size or (64, 64),
        latent_channels=published.latent_channels,
        tokens=published.tokens,
        scaling_factor=published.scaling_factor,
    )
    model = parameters.abstract(family.model, dict(published.model), dtype="bfloat16")
    one = flops.forward_flops(family, model, meta)
    assert one.total / 1e12 == pytest.approx(forward, rel=1e-4)
    both = flops.step_flops(one, needs_reference=True, needs_rejected=True)
    assert both / 1e12 == pytest.approx(pair, rel=1e-4)
    assert both == 8 * one.total


def test_products_are_told_apart_by_what_they_are_made_of():
    """Weights, adapters and data keep their kind through calls, loops and reshapes."""
    x, w = jnp.zeros((4, 4)), jnp.zeros((4, 4))
    product = 2 * 4**3

    def program(frozen, adapter, data):
        for _ in range(2):
            data = jax.jit(lambda a, b: jnp.tanh(a @ b.T))(data, frozen)
        data, _ = jax.lax.scan(lambda a, b: (a @ b, None), data, jnp.stack([frozen] * 3))
        return data @ (2 * adapter), data @ data

    traced = jax.make_jaxpr(program)(w, w, x).jaxpr
    counts, kinds = flops._count(traced, [flops.FROZEN, flops.ADAPTER, flops.DATA])
    assert counts[flops.FROZEN] == 5 * product
    assert counts[flops.ADAPTER] == product
    assert counts[flops.DATA] == product
    assert kinds == [flops.DATA, flops.DATA]


def test_loops_and_branches():
    """A scan counts its trips, a branch its dearest side, remat what it does again."""
    square = jnp.zeros((4, 4))
    product = 2 * 4**3

    def looped(x):
        return jax.lax.scan(lambda x, _: (x @ square, None), x, length=7)[0]

    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    def again(x):
        return jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ square))(x))

    assert flops.jaxpr_flops(jax.make_jaxpr(looped)(square)) == 7 * product
    assert flops.jaxpr_flops(jax.make_jaxpr(jax.jit(branched))(square)) == 2 * product
    assert flops.jaxpr_flops(jax.make_jaxpr(jax.grad(again))(square)) == 3 * product


@pytest.mark.parametrize("keys", [64, 77])
def test_attention_by_cudnn_counts_its_products(keys, monkeypatch):
    """Two in the forward as XLA's; five in the backward, four of them gradients'."""
    monkeypatch.setattr(attention.placement, "platform", lambda: "gpu")
    shapes = [jax.ShapeDtypeStruct((2, tokens, 4, 16), jnp.bfloat16) for tokens in (64, keys, keys)]

    def counted(kernel, backward):
        def run(*given):
            out = attention.attention(*given, kernel=kernel)
            return out.astype(jnp.float32).sum()

        function = jax.grad(run, (0, 1, 2)) if backward else run
        with jax_internals.assumed_cudnn(91200):
            return flops.jaxpr_flops(jax.make_jaxpr(function)(*shapes))

    product = 2 * 2 * 4 * 64 * (keys + keys % 2) * 16
    assert counted("cudnn", False) == 2 * product
    assert counted("cudnn", True) == 7 * product
    plain = 2 * 2 * 4 * 64 * keys * 16
    assert counted("plain", True) == 6 * plain


def test_sharded_kernels_count_every_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    square = jnp.zeros((4, 4))
    product = jax.shard_map(lambda x: x @ square, mesh=mesh, in_specs=rows, out_specs=rows)
    assert flops.jaxpr_flops(jax.make_jaxpr(product)(jnp.zeros((16, 4)))) == 2 * 16 * 4 * 4

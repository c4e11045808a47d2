"""The analytic count equals the traced program's, and the full-size models' known numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.families import SD, SDXL
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.planning import flops
from dmpo_jax.types import Condition
from tests.support import full_size

TOKENS, BATCH = 5, 2
SMALL = {"in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "layers_per_block": 1}
CONFIGS = {
    "sd": {**SMALL, **SD.tiny.model},
    "sdxl": {**SMALL, **SDXL.tiny.model, "layers_per_block": 2},
    "sd2_valid_downsampling": {
        **SMALL,
        **SD.tiny.model,
        "use_linear_projection": True,
        "downsample_padding": 0,
        "transformer_layers_per_block": [1, 2, 1, 1],
    },
}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1")
# Their input is data: the one product of their backward that would give it a gradient is spared.
AT_THE_EDGE = ("conv_in", "_embedding.linear_1", "attn2.to_k", "attn2.to_v")


def trace(config, size, *, rank: int = 0, gradient: bool = False) -> int:
    """FLOPs of the jaxpr of a forward, or of a forward and a backward, as a TPU runs them: on a
    CPU, convolutions of few pixels leave out what only padding meets."""
    unet = parameters.abstract(UNet2DConditionModel, config)
    if rank:
        unet = lora.attach(unet, rank=rank, alpha=rank, targets=TARGETS, seed=0)
    structure, params = parameters.split(unet)
    predict = SD.make_predict(functools.partial(parameters.merge, structure))
    frozen, trained = lora.partition(params) if rank else ({}, params)

    def shape(*dims):
        return jax.ShapeDtypeStruct((BATCH, *dims), jnp.float32)

    added = config.get("addition_embed_type")
    conditioning = Condition(
        shape(TOKENS, config["cross_attention_dim"]),
        shape(24) if added else None,
        shape(6) if added else None,
    )

    def forward(trained, frozen, *inputs):
        return predict({**frozen, **trained}, *inputs).sum()

    program = jax.value_and_grad(forward) if gradient else forward
    device = jax.sharding.AbstractDevice("TPU v5", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(program)(trained, frozen, shape(*size, 4), shape(), conditioning)
    return flops.jaxpr_flops(traced)


@pytest.mark.parametrize(
    ("name", "size"), [("sd", (9, 10)), ("sdxl", (7, 10)), ("sd2_valid_downsampling", (8, 16))]
)
def test_forward_equals_the_jaxpr(name, size):
    config = CONFIGS[name]
    counted = flops.unet_forward(config, height=size[0], width=size[1], tokens=TOKENS, batch=BATCH)
    assert counted.total == trace(config, size)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_backward_equals_the_jaxpr(name):
    """To the last FLOP, once the gradients that the inputs are spared are taken off."""
    shape = {"height": 8, "width": 8, "tokens": TOKENS}
    one = flops.unet_forward(CONFIGS[name], **shape)
    products = flops.unet_products(CONFIGS[name], **shape)
    spared = sum(p.flops for p in products if p.path.endswith(AT_THE_EDGE))
    counted = flops.step_flops(one, needs_reference=False, needs_rejected=False)
    assert counted == 3 * one.total
    assert BATCH * (counted - spared) == trace(CONFIGS[name], (8, 8), gradient=True)


def test_adapters():
    """The forward exactly; the backward short of what lies before the first adapter."""
    config = CONFIGS["sd"]
    rank = {"rank": 3, "targets": TARGETS}
    one = flops.unet_forward(config, height=8, width=8, tokens=TOKENS, **rank)
    assert BATCH * one.total == trace(config, (8, 8), rank=3)
    counted = flops.step_flops(one, needs_reference=False, needs_rejected=False, lora=True)
    # Small as they are, these models spend far more on their edges than full-size ones.
    np.testing.assert_allclose(
        BATCH * counted, trace(config, (8, 8), rank=3, gradient=True), rtol=0.15
    )
    assert counted < flops.step_flops(one, needs_reference=False, needs_rejected=False)


@pytest.mark.parametrize(
    ("config", "side", "forward", "pair"),
    [(full_size.SD15, 64, 0.8033, 6.426), (full_size.SDXL, 128, 6.7612, 54.09)],
    ids=["sd15", "sdxl"],
)
def test_full_size(config, side, forward, pair):
    """TFLOP, as counted from the jaxpr of the models at full size."""
    one = flops.unet_forward(config, height=side, width=side, tokens=77)
    assert one.total / 1e12 == pytest.approx(forward, rel=1e-4)
    whole = flops.step_flops(one, needs_reference=True, needs_rejected=True)
    assert whole / 1e12 == pytest.approx(pair, rel=1e-4)
    assert whole == 8 * one.total
    sft = flops.step_flops(one, needs_reference=False, needs_rejected=False)
    assert sft == 3 * one.total


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


def test_sharded_kernels_count_every_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    square = jnp.zeros((4, 4))
    product = jax.shard_map(lambda x: x @ square, mesh=mesh, in_specs=rows, out_specs=rows)
    assert flops.jaxpr_flops(jax.make_jaxpr(product)(jnp.zeros((16, 4)))) == 2 * 16 * 4 * 4


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="conv_in_kernel=4"):
        flops.unet_forward({"conv_in_kernel": 4}, height=8, width=8, tokens=TOKENS)

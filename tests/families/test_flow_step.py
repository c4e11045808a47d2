"""Flow families' training step: margins of zero at its start, on any devices, in any execution."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.data.encoded.meta import EncodedMeta
from dmpo_jax.diffusion.noise import make_flow_table
from dmpo_jax.families import KLEIN, SD3, Z_IMAGE, Family
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.execution import Execution
from dmpo_jax.models.lora import Adapters
from dmpo_jax.parallel import meshes
from dmpo_jax.toy import debug
from dmpo_jax.training import build, step
from dmpo_jax.types import Condition, PairBatch
from tests.support import steps
from tests.support.quick import AS_USERS

TOKENS = 9
SLOW = pytest.mark.slow


class Model(NamedTuple):
    """A tiny model with two blocks of each kind, which `scan` loops over.

    targets: of adapters.
    """

    family: Family
    config: dict[str, Any]
    targets: tuple[str, ...]


MODELS = {
    "sd3": Model(
        SD3,
        debug.model_config(SD3) | {"num_layers": 4, "dual_attention_layers": [0, 1]},
        ("attn.to_q", "attn.add_v_proj", "attn.to_add_out", "attn2.to_out.0", "ff.net.2"),
    ),
    "klein": Model(
        KLEIN,
        debug.model_config(KLEIN),
        ("to_q", "add_v_proj", "to_out.0", "to_qkv_mlp_proj", "attn.to_out"),
    ),
    "z_image": Model(
        Z_IMAGE,
        debug.model_config(Z_IMAGE) | {"n_refiner_layers": 2},
        ("attention.to_q", "attention.to_out.0", "feed_forward.w2"),
    ),
}


def make_meta(name, side):
    family, config, _ = MODELS[name]
    facts, channels = family.facts(config), debug.vae_config(family)["latent_channels"]
    packed = channels * family.pack**2
    return EncodedMeta.expected(
        family,
        facts,
        size=(side, side),
        latent_channels=channels,
        tokens=TOKENS,
        scaling_factor=1.5305 if family.pack == 1 else tuple(np.linspace(0.5, 1.5, packed)),
        shift_factor=0.0609 if family.pack == 1 else tuple(np.linspace(-0.1, 0.1, packed)),
        moments_dtype="float32",
    )


@functools.cache
def weights(name):
    """Off their initialisation: norms, biases and the table of positions too."""
    family, config, _ = MODELS[name]
    params = parameters.split(parameters.initialise(family.model, config, 0))[1]
    return steps.perturbed(params, 0.05)


def make(name, side, devices=1, mesh=None, **settings):
    """(built step, its first state)."""
    family, config, _ = MODELS[name]
    dtype = settings.get("compute_dtype", "float32")
    structure, _ = parameters.split(parameters.abstract(family.model, config, dtype=dtype))
    copies = {k: jnp.array(x, copy=True) for k, x in weights(name).items()}
    model = parameters.merge(structure, copies)
    given = steps.settings(timesteps={"density": "logit_normal"}, **settings)
    grid = meshes.make_mesh(**(mesh or {}), devices=jax.devices()[:devices])
    noise = make_flow_table(3.0)
    meta, tx = make_meta(name, side), steps.KEEP_GRADIENT
    built, params = build.build(family, model, noise, meta, grid, given, tx=tx)
    return built, built.make_state(params)


def make_batch(name, pairs, side):
    """Pairs of noise; their prompts have several lengths where the model is told of them."""
    rng = np.random.default_rng(0)
    arrays = make_meta(name, side).arrays

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    condition = Condition(
        normal(pairs, *arrays.context.shape),
        pooled=normal(pairs, *arrays.pooled.shape) if arrays.pooled else None,
        lengths=1 + np.arange(pairs, dtype=np.int32) % TOKENS if arrays.length else None,
    )
    preference = rng.uniform(0.5, 1, pairs).astype(np.float32)
    return PairBatch(normal(pairs, *arrays.moments.shape), preference, condition)


def update(built, state, batch):
    batch = meshes.shard_batch(batch, built.batch_sharding(), built.settings.batch_size)
    return built.make_update(state)(state, built.reference, batch, built.make_key(7))


# klein and Z-Image begin at zero in their own runs too (test_flow_transformers).
@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    ["sd3", pytest.param("klein", marks=SLOW), pytest.param("z_image", marks=SLOW)],
)
@pytest.mark.parametrize(
    ("dtype", "adapters", "scan", "pairs"),
    [
        ("bfloat16", None, False, 4),
        pytest.param("float32", None, False, 4, marks=SLOW),
        pytest.param("bfloat16", None, True, 8, marks=SLOW),
        pytest.param("float32", None, True, 3, marks=SLOW),
        pytest.param("bfloat16", "lora", False, 4, marks=SLOW),
        pytest.param("float32", "lora", True, 4, marks=SLOW),
    ],
)
def test_margins_are_exactly_zero_at_step_0(name, dtype, adapters, scan, pairs, monkeypatch):
    monkeypatch.setattr(step, "COMPILER_OPTIONS", {**step.COMPILER_OPTIONS, **AS_USERS})
    built, state = make(
        name,
        16,
        compute_dtype=dtype,
        lora=Adapters(2, MODELS[name].targets) if adapters else None,
        batch_size=pairs,
        execution=Execution(scan=scan, remat="transformer" if scan else "none"),
    )
    _, metrics = update(built, state, make_batch(name, pairs, 16))
    assert float(metrics["margin_abs_max"]) == 0.0
    assert float(metrics["implicit_accuracy"]) == 0.5
    assert float(metrics["chosen_gain"]) == float(metrics["rejected_gain"]) == 0.0
    assert float(metrics["grad_norm"]) > 0


def moved_gradient(name, **given):
    """(loss, gradients) of a policy that has left its reference, in float32."""
    built, state = make(name, 8, batch_size=8, **given)
    shift = steps.perturbed({k: jnp.zeros(x.shape) for k, x in state.params.items()}, steps.MOVED)
    moved = {
        k: jax.device_put(x + jax.device_get(shift[k]), x.sharding) for k, x in state.params.items()
    }
    new, metrics = update(built, state._replace(params=moved), make_batch(name, 8, 8))
    assert float(metrics["margin_abs_max"]) > 0
    return float(metrics["loss"]), jax.device_get(new.opt_state)


one_device = functools.cache(moved_gradient)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param("sd3", marks=SLOW), pytest.param("klein", marks=SLOW), "z_image"]
)
@pytest.mark.parametrize(
    "given",
    [
        {"devices": 8, "mesh": {"data": 2, "fsdp": 4}},
        pytest.param({"execution": Execution(scan=True, remat="transformer")}, marks=SLOW),
        pytest.param({"devices": 8, "mesh": {"fsdp": 4, "tensor": 2}}, marks=SLOW),
        pytest.param({"accumulation": 2}, marks=SLOW),
    ],
)
def test_devices_and_execution_change_nothing(name, given, monkeypatch):
    wanted = one_device(name)
    monkeypatch.setattr(meshes, "SHARDED_FROM", 256)
    loss, gradients = moved_gradient(name, **given)
    assert loss == pytest.approx(wanted[0], rel=1e-4)
    scale = max(np.abs(x).max() for x in wanted[1].values())
    for path, want in wanted[1].items():
        bound = 1e-3 * max(np.abs(want).max(), 1e-3 * scale)
        np.testing.assert_allclose(gradients[path], want, atol=bound, err_msg=path)


def test_positions_are_in_the_reference_alone():
    built, state = make("sd3", 8)
    assert "pos_embed.pos_embed" not in state.params
    assert built.reference["pos_embed.pos_embed"].dtype == jnp.float32
    _, adapters = lora.partition(built.policy(state.params))
    assert adapters == {}

"""SD3's training step: margins of exactly zero at its start, on any devices, in any execution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.data.encoded.meta import EncodedMeta
from dmpo_jax.diffusion.noise import make_flow_table
from dmpo_jax.families import SD3
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
TARGETS = ("attn.to_q", "attn.add_v_proj", "attn.to_add_out", "attn2.to_out.0", "ff.net.2")
CONFIG = debug.model_config(SD3) | {"num_layers": 4, "dual_attention_layers": [0, 1]}


def make_meta(side):
    facts = SD3.facts(CONFIG)
    return EncodedMeta.expected(
        SD3,
        facts,
        size=(side, side),
        latent_channels=16,
        tokens=TOKENS,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        moments_dtype="float32",
    )


@functools.cache
def weights():
    """Off their initialisation: norms, biases and the table of positions too."""
    params = parameters.split(parameters.initialise(SD3.model, CONFIG, 0))[1]
    return steps.perturbed(params, 0.05)


def make(side, devices=1, mesh=None, **settings):
    """(built step, its first state)."""
    dtype = settings.get("compute_dtype", "float32")
    structure, _ = parameters.split(parameters.abstract(SD3.model, CONFIG, dtype=dtype))
    model = parameters.merge(structure, {k: jnp.array(x, copy=True) for k, x in weights().items()})
    given = steps.settings(timesteps={"density": "logit_normal"}, **settings)
    grid = meshes.make_mesh(**(mesh or {}), devices=jax.devices()[:devices])
    noise = make_flow_table(3.0)
    tx = steps.KEEP_GRADIENT
    built, params = build.build(SD3, model, noise, make_meta(side), grid, given, tx=tx)
    return built, built.make_state(params)


def make_batch(pairs, side):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    condition = Condition(normal(pairs, TOKENS, 48), normal(pairs, 40))
    preference = rng.uniform(0.5, 1, pairs).astype(np.float32)
    return PairBatch(normal(pairs, 2, side, side, 32), preference, condition)


def update(built, state, batch):
    batch = meshes.shard_batch(batch, built.batch_sharding(), built.settings.batch_size)
    return built.make_update(state)(state, built.reference, batch, built.make_key(7))


@pytest.mark.parametrize(
    ("dtype", "adapters", "scan", "pairs"),
    [
        ("bfloat16", None, False, 4),
        pytest.param("float32", None, False, 4, marks=SLOW),
        pytest.param("bfloat16", None, True, 8, marks=SLOW),
        pytest.param("float32", None, True, 3, marks=SLOW),
        pytest.param("bfloat16", Adapters(2, TARGETS), False, 4, marks=SLOW),
        pytest.param("float32", Adapters(2, TARGETS), True, 4, marks=SLOW),
    ],
)
def test_margins_are_exactly_zero_at_step_0(dtype, adapters, scan, pairs, monkeypatch):
    monkeypatch.setattr(step, "COMPILER_OPTIONS", {**step.COMPILER_OPTIONS, **AS_USERS})
    built, state = make(
        16,
        compute_dtype=dtype,
        lora=adapters,
        batch_size=pairs,
        execution=Execution(scan=scan, remat="transformer" if scan else "none"),
    )
    _, metrics = update(built, state, make_batch(pairs, 16))
    assert float(metrics["margin_abs_max"]) == 0.0
    assert float(metrics["implicit_accuracy"]) == 0.5
    assert float(metrics["chosen_gain"]) == float(metrics["rejected_gain"]) == 0.0
    assert float(metrics["grad_norm"]) > 0


def moved_gradient(**given):
    """(loss, gradients) of a policy that has left its reference, in float32."""
    built, state = make(8, batch_size=8, **given)
    shift = steps.perturbed({k: jnp.zeros(x.shape) for k, x in state.params.items()}, steps.MOVED)
    moved = {
        k: jax.device_put(x + jax.device_get(shift[k]), x.sharding) for k, x in state.params.items()
    }
    new, metrics = update(built, state._replace(params=moved), make_batch(8, 8))
    assert float(metrics["margin_abs_max"]) > 0
    return float(metrics["loss"]), jax.device_get(new.opt_state)


@pytest.fixture(scope="module")
def one_device():
    return moved_gradient()


@pytest.mark.parametrize(
    "given",
    [
        {"devices": 8, "mesh": {"data": 2, "fsdp": 4}},
        pytest.param({"execution": Execution(scan=True, remat="transformer")}, marks=SLOW),
        pytest.param({"devices": 8, "mesh": {"fsdp": 2, "tensor": 4}}, marks=SLOW),
        pytest.param({"accumulation": 2}, marks=SLOW),
    ],
)
def test_devices_and_execution_change_nothing(given, one_device, monkeypatch):
    monkeypatch.setattr(meshes, "SHARDED_FROM", 256)
    loss, gradients = moved_gradient(**given)
    assert loss == pytest.approx(one_device[0], rel=1e-4)
    scale = max(np.abs(x).max() for x in one_device[1].values())
    for path, want in one_device[1].items():
        bound = 1e-3 * max(np.abs(want).max(), 1e-3 * scale)
        np.testing.assert_allclose(gradients[path], want, atol=bound, err_msg=path)


def test_positions_are_in_the_reference_alone():
    built, state = make(8)
    assert "pos_embed.pos_embed" not in state.params
    assert built.reference["pos_embed.pos_embed"].dtype == jnp.float32
    _, adapters = lora.partition(built.policy(state.params))
    assert adapters == {}

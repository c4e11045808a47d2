"""Updates one after the other, on every layout of devices, against the same ones in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmpo_jax.diffusers_io import placement
from dmpo_jax.parallel import meshes
from dmpo_jax.training import step
from tests.support import steps
from tests.support.launched import run_script
from tests.support.steps import MOVED, make_batch, make_setup, make_unet, perturbed, run_key

UPDATES, PAIRS = 8, 8
UNET = {
    **steps.UNET,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
# Of the way that the parameters go in float64. Every layout stays at 1.2e-4 to 2.1e-4 of it:
# what rounds a logit by some 1e-4 (beta / 2 times a float32's rounding of the errors) moves
# AdamW's steps by as much, whatever the layout.
BOUND = 1e-3
PROCESS = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from dmpo_jax.parallel import processes
processes.join()
from tests.training import test_trajectory
_, params, losses = test_trajectory.trajectory(8, {"fsdp": int(sys.argv[2])})
if jax.process_index() == 0:
    np.savez(sys.argv[1], losses=losses, **params)
"""


def trajectory(devices: int = 1, shape: dict | None = None):
    """Parameters at the start and after UPDATES of AdamW, each on a batch of its own; losses."""
    mesh = meshes.make_mesh(devices=jax.devices()[:devices], **(shape or {}))
    predict, reference = make_unet(UNET, jnp.float32)
    setup = make_setup(tx=optax.adamw(1e-4))._replace(predict=predict)
    state = jax.device_get(step.make_state(perturbed(reference, MOVED), setup.tx))
    start, reference = state.params, jax.device_get(reference)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "SHARDED_FROM", 64)  # or a model this small is replicated
        # Half of the compile time is LLVM's optimisation.
        quick = {**step.COMPILER_OPTIONS, "xla_backend_optimization_level": 0}
        patch.setattr(step, "COMPILER_OPTIONS", quick)
        shardings = meshes.parameter_sharding(mesh, (state, reference))
        update = step.jit_train_step(setup, shardings[0])
        state, reference = jax.device_put((state, reference), shardings)
        sharding, losses = meshes.batch_sharding(mesh), []
        rows = meshes.local_rows(sharding, PAIRS)
        for i in range(UPDATES):
            local = jax.tree.map(lambda x: x[rows], make_batch(PAIRS, seed=i))
            batch = meshes.shard_batch(local, sharding, PAIRS)
            state, metrics = update(state, reference, batch, run_key())
            losses.append(float(metrics["loss"]))
    assert int(state.skipped) == 0
    return start, {k: placement.gather(v) for k, v in state.params.items()}, np.array(losses)


@pytest.fixture(scope="module")
def in_float64():
    """Of the same code, in which float32 means float64, and what is drawn is drawn as ever."""
    normal, randint = jax.random.normal, jax.random.randint

    def drawn_single(key, shape=(), dtype=None):
        return normal(key, shape, np.float32).astype(np.float64)

    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(jax.random, "normal", drawn_single)
        patch.setattr(jax.random, "randint", functools.partial(randint, dtype=np.int32))
        patch.setattr(jnp, "float32", jnp.float64)
        start, params, losses = trajectory()
    assert {x.dtype for x in params.values()} == {np.dtype(np.float64)}
    return start, params, losses


def distance(a, b) -> float:
    assert set(a) == set(b)
    return float(np.sqrt(sum(np.square(a[k].astype(np.float64) - b[k]).sum() for k in b)))


def assert_stays_near(params, losses, in_float64):
    start, exact, exact_losses = in_float64
    apart = distance(params, exact) / distance(start, exact)
    furthest = np.abs(losses / exact_losses - 1).max()
    print(f"from float64 after {UPDATES} updates: {apart:.1e} of the way, losses {furthest:.1e}")
    assert apart < BOUND
    assert furthest < BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "shape"),
    [(1, {}), (8, {}), (8, {"fsdp": 8}), (8, {"fsdp": 2, "tensor": 2})],
)
def test_every_layout_stays_near_float64(devices, shape, in_float64):
    _, params, losses = trajectory(devices, shape)
    assert_stays_near(params, losses, in_float64)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 8])
def test_two_processes_of_four_devices_stay_near_float64(fsdp, in_float64, tmp_path):
    run_script(PROCESS, tmp_path / "out.npz", fsdp, timeout=1200)
    params = dict(np.load(tmp_path / "out.npz"))
    assert_stays_near(params, params.pop("losses"), in_float64)

"""Convolution kernels in another order in memory: the same run, donated, saved and restored."""

import jax
import numpy as np
import pytest
from etils import epath

from dmpo_jax.families import SD
from dmpo_jax.models import parameters
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.parallel import layouts, meshes
from dmpo_jax.training import build
from dmpo_jax.training.checkpoint import Checkpoints
from dmpo_jax.training.loop import start_state
from tests.support import steps

# Orbax leaves coroutines to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
KERNEL = "mid_block.resnets.0.conv1.kernel"
OPTIMIZER = {"name": "adamw", "clip_norm": 1.0}


@pytest.fixture
def on_this_platform(monkeypatch):
    """CPUs then have the order of GPUs."""
    monkeypatch.setattr(layouts, "PLATFORMS", ("cpu",))


def make_step(**mesh):
    model = parameters.initialise(UNet2DConditionModel, steps.UNET, 0)
    grid = meshes.make_mesh(**mesh, devices=jax.devices()[: max(mesh.values())])
    given = steps.settings(optimizer=OPTIMIZER, ema_decay=0.9)
    return build.build(SD, model, steps.SCHEDULE, steps.META, grid, given)


def train(folder, mesh):
    """Trains two updates, saves, resumes and trains one more.

    Returns (step, first state, [first, after 1, after 2, restored, last], orders of each in memory,
    margins of every update).
    """
    checkpoints = Checkpoints(epath.Path(folder), keep=1, identity={})
    built, params = make_step(**mesh)
    states, kernels, seen = [built.make_state(params)], [], []
    update = built.make_update(states[0])
    batch = jax.device_put(steps.make_batch(2), built.batch_sharding())
    first = jax.device_get(states[0])
    with checkpoints:
        for number in range(3):
            if number == 2:
                checkpoints.save(2, states[-1])
                checkpoints.wait()
                again, params = make_step(**mesh)
                with Checkpoints(epath.Path(folder), keep=1, identity={}) as reader:
                    states.append(start_state(again, params, reader))
            kernels.append(orders(states[-1]))
            state, metrics = update(states[-1], built.reference, batch, built.make_key(0))
            states.append(state)
            seen.append(jax.device_get(metrics["pairs"]))
    return built, first, states, [*kernels, orders(states[-1])], seen


def orders(tree):
    """{path: axes from outermost to innermost} of the leaves of four axes."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): x.format.layout.major_to_minor
        for path, x in found
        if x.ndim == 4
    }


def test_only_convolution_kernels_change_their_order(on_this_platform, monkeypatch):
    grid = meshes.make_mesh(devices=jax.devices()[:1])
    shapes = {"conv.kernel": (3, 3, 4, 8), "linear.kernel": (4, 8), "table": (1, 2, 3, 4)}
    values = {path: np.random.default_rng(0).normal(size=shape) for path, shape in shapes.items()}
    given = jax.device_put(values, meshes.parameter_sharding(grid, values))
    kept = layouts.arrange(given, grid)
    assert orders(kept) == {"['conv.kernel']": (3, 0, 1, 2), "['table']": (0, 1, 2, 3)}
    jax.tree.map(np.testing.assert_array_equal, kept, given)
    assert layouts.arrange(kept, grid, donate=True)["conv.kernel"] is kept["conv.kernel"]
    layouts.arrange(given, grid, donate=True)
    assert [x.is_deleted() for x in given.values()] == [True, False, False]
    monkeypatch.setattr(layouts, "PLATFORMS", ("gpu",))
    assert layouts.parameter_formats(grid, kept) == meshes.parameter_sharding(grid, kept)


@pytest.mark.slow  # compiles four steps; the test above holds the order itself
def test_order_of_kernels_changes_nothing_but_itself(tmp_path, on_this_platform, monkeypatch):
    mesh = {"data": 1, "fsdp": 2}
    built, first, states, kernels, seen = train(tmp_path / "arranged", mesh)
    for each in (*kernels, orders(built.reference)):
        assert {*each.values()} == {(3, 0, 1, 2)}
    donated = [state.opt_state[1].mu[KERNEL].is_deleted() for state in states]
    assert donated == [True, True, False, True, False]
    assert {*orders(built.abstract_state(built.reference)).values()} == {(3, 0, 1, 2)}

    monkeypatch.setattr(layouts, "PLATFORMS", ("gpu",))
    plain, begun, theirs, others, expected = train(tmp_path / "plain", mesh)
    for each, other in zip(kernels, others, strict=True):
        # Parameters, two moments and their average.
        assert each.keys() == other.keys()
        assert sum(KERNEL in path for path in each) == 4
        assert {*other.values()} == {(0, 1, 2, 3)}
    assert {*orders(plain.reference).values()} == {(0, 1, 2, 3)}
    jax.tree.map(np.testing.assert_array_equal, first, begun)
    ours, theirs = jax.device_get((states[-1], theirs[-1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)
    np.testing.assert_allclose(seen, expected, rtol=1e-3, atol=1e-4)

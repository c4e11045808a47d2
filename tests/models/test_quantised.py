"""Frozen kernels in int8: their numbers, which ones, and the steps and runs that hold them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.config import checks, configs
from dmpo_jax.families import KLEIN, PUBLISHED, SD3, SDXL, Z_IMAGE
from dmpo_jax.models import parameters
from dmpo_jax.models.execution import Execution
from dmpo_jax.models.lora import Adapters
from dmpo_jax.models.quantised import Holding, Quantised, quantise
from dmpo_jax.parallel import meshes
from dmpo_jax.planning.step import of_published
from dmpo_jax.toy import debug
from dmpo_jax.training import build, step
from tests.support import steps
from tests.support.quick import AS_USERS, EXACT

SLOW = pytest.mark.slow
MODELS = {
    "sdxl": (
        SDXL,
        {
            "block_out_channels": [32],
            "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["UpBlock2D"],
            "transformer_layers_per_block": [2],
            "attention_head_dim": [4],
            "layers_per_block": 1,
        },
        ("to_q", "to_out.0", "ff.net.2", "conv1"),
    ),
    "sd3": (SD3, {"num_layers": 2}, ("attn.to_q", "attn.add_v_proj", "ff.net.2")),
}


def make(name, *, held="int8", devices=1, lora=True, **given):
    """(step, state, batch) of a tiny model off its initialisation."""
    family, changes, targets = MODELS[name]
    made = debug.published(family)
    made = made._replace(model={**made.model, **changes})
    shape = of_published(made, name, resolution=8 * made.factor, moments_dtype="float32")
    dtype = given["compute_dtype"]
    model = parameters.initialise(family.model, dict(made.model), 0, dtype=dtype)
    structure, params = parameters.split(model)
    model = parameters.merge(structure, steps.perturbed(params, 0.02))
    settings = steps.settings(
        frozen_dtype=held, lora=Adapters(2, targets) if lora else None, batch_size=4, **given
    )
    mesh = meshes.make_mesh(data=1, fsdp=devices, devices=jax.devices()[:devices])
    built, params = build.build(
        family, model, shape.noise, shape.meta, mesh, settings, tx=steps.KEEP_GRADIENT
    )
    return built, built.make_state(params), random_batch(built)


def random_batch(built):
    rng = np.random.default_rng(0)

    def draw(x):
        return rng.uniform(0.5, 1, x.shape).astype(x.dtype)

    size, sharding = built.settings.batch_size, built.batch_sharding()
    batch = jax.tree.map(draw, built.meta.abstract_batch(size, sharding))
    return meshes.shard_batch(batch, sharding, size)


def update(built, state, batch, reference=None):
    with jax.set_mesh(built.mesh):
        fn = built.make_update(state)
        return fn(state, reference or built.reference, batch, built.make_key(7))


def moved(state):
    """The state of a policy that has left its reference."""
    shift = steps.perturbed({k: jnp.zeros(x.shape) for k, x in state.params.items()}, 1e-2)
    params = {
        k: jax.device_put(jax.device_get(x) + jax.device_get(shift[k]), x.sharding)
        for k, x in state.params.items()
    }
    return state._replace(params=params)


def kept(reference):
    return {path: x for path, x in reference.items() if isinstance(x, Quantised)}


def dequantised(params):
    return {
        path: x.dequantised(jnp.float32) if isinstance(x, Quantised) else x
        for path, x in params.items()
    }


@pytest.mark.parametrize("shape", [(64, 32), (3, 3, 16, 8)])
def test_each_number_moves_by_at_most_half_a_step(shape):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1]))
    kernel[..., 3] = 0
    found = quantise(jnp.asarray(kernel, jnp.float32))
    assert found.values.dtype == jnp.int8
    assert found.scale.shape == shape[-1:]
    largest = np.abs(kernel).max(tuple(range(len(shape) - 1)))
    np.testing.assert_allclose(found.scale, largest / 127, rtol=1e-6)
    error = np.abs(np.asarray(found.dequantised(jnp.float32)) - kernel)
    assert (error <= 0.5001 * np.asarray(found.scale)).all()
    assert (np.asarray(found.dequantised(jnp.float32))[..., 3] == 0).all()
    again = quantise(found.dequantised(jnp.float32))
    np.testing.assert_array_equal(again.values, found.values)


def test_what_is_held_in_which_dtype():
    """Kernels inside the blocks in int8; first and last layers, time, norms and biases not."""
    for family in (SDXL, SD3, KLEIN, Z_IMAGE):  # of each model's class
        held = Holding(jnp.bfloat16, int8=True, sensitive=family.sensitive)
        model = parameters.abstract(family.model, debug.model_config(family))
        kinds = {path: held(path, x) for path, x in parameters.shapes(model).items()}
        assert len(kept(kinds)) > 10, family.name
        for path, x in kinds.items():
            if isinstance(x, Quantised):
                assert path.endswith(".kernel"), path
                assert math.prod(x.shape) >= 1024, path
                assert not {*path.split(".")} & {*family.sensitive}, path
                # A list of blocks: none of a model's first and last layers is in one.
                assert any(part.isdigit() for part in path.split(".")), path
            else:
                assert x.dtype == parameters.frozen_dtype(path, jnp.bfloat16)


@pytest.mark.slow
def test_nearly_all_of_sdxl_is_int8():
    one = PUBLISHED["sdxl"]
    held = Holding(jnp.bfloat16, int8=True, sensitive=one.family.sensitive)
    model = parameters.abstract(one.family.model, one.model)
    params = {path: held(path, x) for path, x in parameters.shapes(model).items()}
    leaves = jax.tree.leaves(params)
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    count = sum(math.prod(x.shape) for x in params.values())
    assert total / count == pytest.approx(1.01, abs=0.02)  # bytes a number


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "dtype", "execution", "options"),
    [
        ("sdxl", "bfloat16", Execution(), EXACT),
        ("sd3", "float32", Execution(), EXACT),
        *(
            pytest.param(name, dtype, how, AS_USERS, marks=SLOW)
            for name in MODELS
            for dtype in ("bfloat16", "float32")
            for how in (Execution(), Execution("plain", "transformer", True))
        ),
    ],
)
def test_margins_on_an_int8_base_are_exactly_zero_at_step_0(
    name, dtype, execution, options, monkeypatch
):
    monkeypatch.setattr(step, "COMPILER_OPTIONS", {**step.COMPILER_OPTIONS, **options})
    built, state, batch = make(name, compute_dtype=dtype, execution=execution)
    assert len(kept(built.reference)) > 10
    _, metrics = update(built, state, batch)
    assert float(metrics["margin_abs_max"]) == 0.0
    assert float(metrics["chosen_gain"]) == float(metrics["rejected_gain"]) == 0.0
    assert float(metrics["grad_norm"]) > 0


def gradient(built, state, batch, reference=None):
    """(loss, gradients)."""
    state, metrics = update(built, moved(state), batch, reference)
    assert float(metrics["margin_abs_max"]) > 0
    return float(metrics["loss"]), jax.device_get(state.opt_state)


@functools.cache
def on_one_device(name):
    return gradient(*make(name, compute_dtype="float32"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd3", pytest.param("sdxl", marks=SLOW)])
def test_an_int8_base_is_the_base_of_its_own_numbers(name):
    """Loss and gradients are those of a base of float32 kernels that int8 stands for."""
    built, state, batch = make(name, compute_dtype="float32", held="compute")
    ours, _, _ = make(name, compute_dtype="float32")
    loss, gradients = gradient(built, state, batch, dequantised(ours.reference))
    held_loss, held_gradients = on_one_device(name)
    assert held_loss == pytest.approx(loss, rel=1e-6)
    for path, x in gradients.items():
        np.testing.assert_allclose(held_gradients[path], x, rtol=1e-4, atol=1e-6 * np.abs(x).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"devices": 4},
        {"devices": 2, "execution": Execution("plain", "transformer", True)},
        {"accumulation": 2},
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_devices_and_execution_change_nothing(name, given, monkeypatch):
    """Sharded kernels are gathered as int8, and their scales are on every device."""
    loss, wanted = on_one_device(name)
    monkeypatch.setattr(meshes, "SHARDED_FROM", 64)
    built, state, batch = make(name, compute_dtype="float32", **given)
    if given.get("devices"):
        sharded = [x for x in kept(built.reference).values() if "fsdp" in str(x.values.sharding)]
        assert len(sharded) > 10
        with jax.set_mesh(built.mesh):
            lowered = built.make_update(state).lower(
                state, built.reference, batch, built.make_key(7)
            )
        gathers = [x for x in lowered.compile().as_text().splitlines() if " all-gather(" in x]
        assert sum(" s8[" in x for x in gathers) > 10
    found, gradients = gradient(built, state, batch)
    assert found == pytest.approx(loss, rel=1e-4)
    for path, x in wanted.items():
        np.testing.assert_allclose(gradients[path], x, rtol=2e-3, atol=2e-4 * np.abs(x).max())


@pytest.mark.long
def test_a_full_runs_reference_alone_is_int8():
    """Its margins begin near 0, at the size that rounding the reference makes."""
    built, state, batch = make("sdxl", compute_dtype="float32", lora=False)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
    assert len(kept(built.reference)) > 10
    _, metrics = update(built, state, batch)
    assert 0 < float(metrics["margin_abs_max"]) < 0.05 * float(metrics["chosen_error"])


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        ({"objective": "sft"}, "a reference, which 'sft' does not use: unset it"),
        ({"reference.decay": 0.9}, "moves by less than a step of int8: unset either"),
        ({"model.frozen_dtype": "int4"}, "must be one of compute, int8"),
    ],
)
def test_it_is_refused_where_nothing_is_frozen(leaves, words):
    values = {"model.folder": "x", "model.frozen_dtype": "int8", **leaves}
    config = configs.from_flat({**configs.flatten(configs.defaults()), **values})
    with pytest.raises(ValueError, match=words):
        checks.validate(config)
    if "model.frozen_dtype" not in leaves:
        config.lora.rank = 4  # the base is frozen, whatever the reference does
        checks.validate(config)


def test_calibration_needs_margins_that_begin_at_0():
    config = configs.defaults()
    config.model.frozen_dtype = "int8"
    with pytest.raises(ValueError, match=r"--config\.model\.frozen_dtype=compute"):
        checks.check_calibration(config)
    config.lora.rank = 4
    checks.check_calibration(config)


def test_it_is_another_run_and_the_default_is_the_run_that_it_was():
    config = configs.defaults()
    before = configs.identity(config)
    assert "frozen_dtype" not in before["model"]
    config.model.frozen_dtype = "int8"
    assert configs.identity(config)["model"]["frozen_dtype"] == "int8"

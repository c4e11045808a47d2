"""Execution of a UNet (remat, scan, mesh) never changes its results."""

import functools
import re
import types
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx

from dmpo_jax.config import configs
from dmpo_jax.models import attention, execution, lora, parameters
from dmpo_jax.models.execution import Execution
from dmpo_jax.models.layers import Conv, Linear
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.parallel import meshes, placement
from dmpo_jax.planning import hlo
from tests.support import full_size

UNET = {
    "block_out_channels": [32],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [2],
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "use_linear_projection": True,
}


@functools.cache
def model():
    return parameters.initialise(UNet2DConditionModel, UNET, 0)


def initial():
    return parameters.split(model())[1]


def predict(how: Execution):
    unet = model()
    unet.execution = how
    structure, _ = parameters.split(unet)
    return lambda params, *args: parameters.merge(structure, params)(*args)


def inputs():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(8, 4, 4, 4)).astype(np.float32)
    return sample, np.arange(8) * 100, rng.normal(size=(8, 5, 8)).astype(np.float32)


def loss_and_gradient(how: Execution, mesh=None):
    """Of a random linear loss; the compiled program too."""
    forward = placement.over_rows(predict(how), mesh)
    # Of a seed whose sum does not cancel: 17.9, for a bound that is relative.
    weights = np.random.default_rng(2).normal(size=(8, 4, 4, 4)).astype(np.float32)

    def loss(params, *args):
        return (forward(params, *args) * weights).sum()

    params, given = initial(), inputs()
    if mesh is not None:
        params = jax.device_put(params, meshes.parameter_sharding(mesh, params))
        given = jax.device_put(given, meshes.batch_sharding(mesh))
    run = jax.jit(jax.value_and_grad(loss))
    compiled = run.lower(params, *given).compile()
    return jax.device_get(compiled(params, *given)), compiled


@functools.cache
def plain():
    return loss_and_gradient(Execution())[0]


def assert_close(got, want, bound):
    (loss, gradient), (wanted_loss, wanted) = got, want
    assert loss == pytest.approx(wanted_loss, rel=bound)
    for path, x in wanted.items():
        scale = np.abs(x).max()
        np.testing.assert_allclose(gradient[path], x, atol=bound * scale, err_msg=path)


@pytest.mark.long
@pytest.mark.parametrize(
    "how",
    [
        Execution(scan=True),
        Execution(remat="block"),
        Execution(remat="transformer", scan=True),
        Execution(remat="offload", scan=True),
        pytest.param(Execution(remat="transformer"), marks=pytest.mark.slow),
        pytest.param(Execution(remat="block", scan=True), marks=pytest.mark.slow),
        pytest.param(Execution(remat="offload"), marks=pytest.mark.slow),
    ],
)
def test_remat_and_scan_change_nothing(how):
    assert_close(loss_and_gradient(how)[0], plain(), 2e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({"data": 1, "fsdp": 8}, Execution()),
        pytest.param(
            {"data": 1, "fsdp": 8},
            Execution(remat="transformer", scan=True),
            marks=pytest.mark.slow,
        ),
        ({"data": 2, "fsdp": 2, "tensor": 2}, Execution(remat="transformer", scan=True)),
        pytest.param({"data": 1, "fsdp": 2, "tensor": 4}, Execution(), marks=pytest.mark.slow),
    ],
)
def test_a_sharded_model_computes_the_same(shape, how, monkeypatch):
    """And the compiler moves parameters, not activations."""
    monkeypatch.setattr(meshes, "SHARDED_FROM", 256)
    got, compiled = loss_and_gradient(how, meshes.make_mesh(**shape))
    assert_close(got, plain(), 2e-5)
    if "tensor" not in shape:
        kinds = r"\b(all-gather|all-to-all|collective-permute|reduce-scatter)\("
        found = set(re.findall(kinds, compiled.as_text()))
        assert found == {"all-gather", "reduce-scatter"}
        shardings = meshes.parameter_sharding(meshes.make_mesh(**shape), initial())
        cut = [x for path, x in initial().items() if any(shardings[path].spec)]
        found = hlo.collectives(compiled.as_text(), [np.shape(x) for x in cut])
        gathered = sum(c.trips * c.payload for c in found if c.kind == "all-gather")
        # One forward: without remat its kernels serve the backward too, else they come again.
        times = gathered / sum(np.size(x) * 4 for x in cut)
        assert times == 1 if how.remat == "none" else 1 < times <= 2


@pytest.mark.long
def test_rules_are_the_layers_own():
    """`mesh.RULES` knows paths, layers know themselves: both must say the same."""
    for config in (full_size.SD15, full_size.SDXL):
        unet = parameters.abstract(UNet2DConditionModel, config)
        targets = ("to_q", "to_out.0", "conv1", "conv2", "ff.net.0.proj", "ff.net.2")
        unet = lora.attach(unet, rank=4, alpha=4, targets=targets, seed=0)
        found = set()
        for path, layer in nnx.iter_modules(unet):
            if isinstance(layer, Linear | Conv):
                name = ".".join(map(str, path))
                assert meshes.split_of(f"{name}.kernel") == layer.split, name
                found.add(layer.split)
        assert found == {"columns", "rows", "whole"}


@pytest.mark.parametrize(
    ("platform", "scan", "kernel"),
    [("gpu", False, "cudnn"), ("tpu", True, "splash"), ("cpu", True, "plain")],
)
def test_choices_follow_the_devices(platform, scan, kernel):
    device = types.SimpleNamespace(platform=platform)
    mesh = mock.Mock(spec=jax.sharding.Mesh, devices=np.array([device], object))
    asked = Execution(execution.AUTO, "transformer", scan=True)
    assert asked.on(mesh) == Execution(kernel, "transformer", scan)
    assert asked._replace(attention="plain").on(mesh).attention == "plain"


def test_config_knows_every_choice():
    assert tuple(configs.LEAVES["model.remat"].check) == execution.REMAT
    assert tuple(configs.LEAVES["model.attention"].check) == ("auto", *attention.KERNELS)


def test_the_mesh_says_what_is_compiled_for():
    """A program for TPUs may be compiled where there is none."""
    device = jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
    assert placement.platform() == jax.default_backend()
    with jax.sharding.use_abstract_mesh(mesh):
        assert placement.platform() == "tpu"

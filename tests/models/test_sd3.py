"""SD3's transformer against PyTorch diffusers': outputs, gradients, files, execution."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dmpo_jax import diffusers_io
from dmpo_jax.families import PUBLISHED
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.execution import Execution
from dmpo_jax.models.layers import Conv, Linear
from dmpo_jax.models.sd3 import EPSILON, SD3Transformer2DModel, sincos_table
from dmpo_jax.parallel import meshes, placement
from tests.models.test_models import nhwc, relative_error
from tests.support import torch_models

FOLDERS = ("theirs", "ours")
SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def given(model, size, seed=1):
    """The same inputs for both: (torch keywords, jax arguments)."""
    g = torch.Generator().manual_seed(seed)
    config = model.config
    latents = torch.randn(3, config.in_channels, *size, generator=g)
    times = torch.tensor([1.0, 437.25, 1000])
    context = torch.randn(3, 7, config.joint_attention_dim, generator=g)
    pooled = torch.randn(3, config.pooled_projection_dim, generator=g)
    theirs = {
        "hidden_states": latents,
        "timestep": times,
        "encoder_hidden_states": context,
        "pooled_projections": pooled,
    }
    ours = nhwc(latents), times.numpy(), context.numpy(), pooled.numpy()
    return theirs, [jnp.asarray(x) for x in ours]


@pytest.mark.long
@pytest.mark.parametrize("name", torch_models.SD3S)
def test_predictions_and_gradients(name, tmp_path):
    theirs = torch_models.sd3(name)
    theirs.save_pretrained(tmp_path)
    ours = diffusers_io.load_model(tmp_path)
    structure, params = parameters.split(ours)
    trained, buffers = parameters.partition(ours, params)
    assert buffers.keys() == {"pos_embed.pos_embed"}
    kwargs, args = given(theirs, torch_models.SD3S[name][1])
    out = theirs(**kwargs).sample
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()

    def weighted(trained, *args):
        prediction = parameters.merge(structure, {**trained, **buffers})(*args)
        return (prediction * nhwc(weight)).sum(), prediction

    got, prediction = jax.jit(jax.grad(weighted, has_aux=True))(trained, *args)
    assert relative_error(prediction, nhwc(out)) <= 1e-5
    want = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
    assert {diffusers_io.torch_name(path) for path in got} == set(want)
    ours = {
        diffusers_io.torch_name(p): diffusers_io.to_torch(p, np.asarray(g)) for p, g in got.items()
    }
    order = sorted(want)
    flat = [np.concatenate([side[n].ravel() for n in order]) for side in (ours, want)]
    assert relative_error(*flat) <= 1e-4
    scale = np.linalg.norm(flat[1])
    for n in order:  # no single tensor may hide behind the large ones
        bound = 1e-4 * max(np.linalg.norm(want[n]), 1e-3 * scale)
        assert np.linalg.norm(ours[n] - want[n]) <= bound, n


def test_every_norm_has_pytorchs_epsilon():
    """Which activations of order one hide: ten times as much stays within the bound above."""
    modules = torch_models.sd3("sd35_dual").modules()
    assert {module.eps for module in modules if hasattr(module, "eps")} == {EPSILON}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pytorch_and_back_to_the_bit(dtype, tmp_path):
    theirs = torch_models.sd3("sd35_dual").to(dtype)
    theirs.pos_embed.pos_embed.add_(0.5)  # no table that a class could draw again
    theirs.save_pretrained(tmp_path / "theirs")
    held = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}[dtype]
    ours = diffusers_io.load_model(tmp_path / "theirs", param_dtype=held)
    diffusers_io.save_model(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours", torch_dtype=dtype)
    want, got = theirs.state_dict(), again.state_dict()
    assert got.keys() == want.keys()
    assert "pos_embed.pos_embed" in want
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in FOLDERS)
    assert before == after


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "trained", "table"),
    [
        ("sd3_medium", 2_028_328_000, 192),
        ("sd35_medium", 2_243_171_520, 384),
        ("sd35_large", 8_056_627_520, 192),
    ],
)
def test_published_models_have_their_number_of_parameters(name, trained, table):
    """Laid out abstractly. "2.5B" counts SD3.5-medium's table of positions."""
    config = PUBLISHED[name].model
    model = parameters.abstract(SD3Transformer2DModel, config)
    params, buffers = parameters.partition(model, parameters.shapes(model))
    assert sum(x.size for x in params.values()) == trained
    (positions,) = buffers.values()
    assert positions.shape == (1, table**2, config["caption_projection_dim"])
    if name == "sd35_medium":
        assert len(params) + len(buffers) == 909


def test_rules_are_the_layers_own():
    """`mesh.RULES` knows paths, layers know themselves: both must say the same."""
    model = parameters.abstract(SD3Transformer2DModel, DEEP)
    targets = ("attn.to_q", "attn.add_q_proj", "attn.to_add_out", "attn2.to_out.0", "ff.net.2")
    model = lora.attach(model, rank=4, alpha=4, targets=targets, seed=0)
    found = set()
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear | Conv):
            name = ".".join(map(str, path))
            assert meshes.split_of(f"{name}.kernel") == layer.split, name
            found.add(layer.split)
    assert found == {"columns", "rows", "whole"}


@pytest.mark.parametrize("side", [4, 9])
def test_the_table_of_a_new_model_is_pytorchs(side):
    config = {
        "sample_size": 8,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "caption_projection_dim": 24,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": side,
    }
    theirs = diffusers.SD3Transformer2DModel(**config).pos_embed.pos_embed.numpy()
    ours = sincos_table(config)
    assert ours.shape == (1, side**2, 24)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_latents_larger_than_the_table_are_refused():
    config = torch_models.SD3
    model = parameters.abstract(SD3Transformer2DModel, config)
    shapes = (1, 16, 8, 4), (1,), (1, 3, 20), (1, 12)
    with pytest.raises(ValueError, match="8 x 4 patches, but pos_embed_max_size=7"):
        jax.eval_shape(lambda m, *a: m(*a), model, *map(jnp.zeros, shapes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"caption_projection_dim": 32}, "caption_projection_dim=32 must be 24"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size=None"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ({"added_later": True}, "added_later=True"),
    ],
)
def test_other_configs_are_refused_by_name(changes, match):
    with pytest.raises(ValueError, match=match):
        parameters.abstract(SD3Transformer2DModel, torch_models.SD3 | changes)


# --- execution never changes results ---------------------------------------------

DEEP = {**torch_models.SD3S["sd35_dual"][0], "num_layers": 6, "attention_head_dim": 8}
DEEP |= {"num_attention_heads": 4, "caption_projection_dim": 32}  # 2 dual, 3 plain, the last


def value_and_gradients(how: Execution, mesh=None):
    model = parameters.initialise(SD3Transformer2DModel, DEEP, 0)
    model.execution = how
    structure, params = parameters.split(model)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {k: x + 0.1 * normal(*x.shape) for k, x in params.items()}
    inputs = normal(8, 8, 8, 4), 100 * np.arange(8.0), normal(8, 5, 20), normal(8, 12)
    weights = normal(8, 8, 8, 4)
    forward = placement.over_rows(lambda p, *a: parameters.merge(structure, p)(*a), mesh)

    def loss(params, *args):
        return (forward(params, *args) * weights).sum()

    if mesh is not None:
        params = jax.device_put(params, meshes.parameter_sharding(mesh, params))
        inputs = jax.device_put(inputs, meshes.batch_sharding(mesh))
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, *inputs))


@pytest.fixture(scope="module")
def plain():
    return value_and_gradients(Execution())


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "mesh"),
    [
        (Execution(scan=True, remat="transformer"), None),
        (Execution(scan=True), {"data": 2, "fsdp": 4}),
        pytest.param(Execution(scan=True), None, marks=SLOW),
        pytest.param(Execution(scan=True, remat="block"), None, marks=SLOW),
        pytest.param(Execution(scan=True, remat="offload"), None, marks=SLOW),
        pytest.param(Execution(), {"data": 8}, marks=SLOW),
        pytest.param(Execution(), {"data": 2, "fsdp": 2, "tensor": 2}, marks=SLOW),
    ],
)
def test_execution_changes_nothing(how, mesh, plain, monkeypatch):
    monkeypatch.setattr(meshes, "SHARDED_FROM", 256)
    loss, gradients = value_and_gradients(how, mesh and meshes.make_mesh(**mesh))
    assert loss == pytest.approx(plain[0], rel=2e-5)
    for path, x in plain[1].items():
        scale = np.abs(x).max() + 1e-6
        np.testing.assert_allclose(gradients[path], x, atol=2e-5 * scale, err_msg=path)


def test_scan_compiles_each_run_of_equal_blocks_once():
    model = parameters.abstract(SD3Transformer2DModel, DEEP)
    model.execution = Execution(scan=True)
    shapes = (1, 8, 8, 4), (1,), (1, 3, 20), (1, 12)
    traced = jax.make_jaxpr(lambda m, *a: m(*a))(model, *map(jnp.zeros, shapes))
    lengths = [e.params["length"] for e in traced.eqns if e.primitive.name == "scan"]
    assert lengths == [2, 3]

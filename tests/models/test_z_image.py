"""Parity of Z-Image's transformer with PyTorch diffusers."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dmpo_jax import families
from dmpo_jax.families import z_image as family
from dmpo_jax.models import parameters
from dmpo_jax.models.execution import Execution
from dmpo_jax.models.z_image import ZImageTransformer2DModel
from dmpo_jax.types import Condition
from tests.support import parity
from tests.support.torch_models import randomise

CONFIG = {
    "in_channels": 3,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 20,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 16, 16],
}


def inputs(height, width, lengths, words=64):
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    n = len(lengths)
    clean = np.array([0.0, 0.437, 0.999], np.float32)[:n]
    return normal(n, height, width, 3), clean, normal(n, words, 20), np.array(lengths, np.int32)


def torch_model(**changes):
    theirs = randomise(diffusers.ZImageTransformer2DModel(**{**CONFIG, **changes}))
    with torch.no_grad():  # at zero they would hide where they are put
        theirs.x_pad_token.normal_(generator=torch.Generator().manual_seed(5))
        theirs.cap_pad_token.normal_(generator=torch.Generator().manual_seed(6))
    return theirs


@pytest.mark.parametrize(
    ("changes", "size", "lengths"),
    [
        ({}, (6, 10), (7, 32, 45)),  # 15 patches, filled up to 32
        ({"qk_norm": False, "n_refiner_layers": 2}, (8, 16), (64, 64, 1)),  # 32 patches
    ],
)
def test_outputs_and_gradients_are_those_of_pytorch(changes, size, lengths, tmp_path):
    theirs = torch_model(**changes)
    theirs.save_pretrained(tmp_path)
    latents, clean, context, lengths = inputs(*size, lengths)
    condition = Condition(context, lengths=lengths)
    told = jax.tree.map(torch.tensor, family.torch_inputs(latents, 1000 * (1 - clean), condition))
    out = torch.stack(theirs(**told).sample)[:, :, 0]
    args = tuple(map(jnp.asarray, (latents, clean, context, lengths)))
    parity.check(theirs, tmp_path, args, out)
    parity.check_files(tmp_path, tmp_path / "again")


@pytest.mark.long
def test_prompts_of_three_lengths_are_each_as_alone():
    model = parameters.initialise(ZImageTransformer2DModel, CONFIG, 0)
    structure, params = parameters.split(model)
    for path in ("x_pad_token", "cap_pad_token"):
        params[path] = params[path] + 0.5
    run = jax.jit(lambda params, *args: parameters.merge(structure, params)(*args))
    latents, clean, context, lengths = inputs(6, 10, (7, 32, 45))
    together = run(params, latents, clean, context, lengths)
    for i in range(3):
        one = slice(i, i + 1)
        stored = 32 * -(-int(lengths[i]) // 32)  # no more than its own text needs
        alone = run(params, latents[one], clean[one], context[one, :stored], lengths[one])
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


@pytest.mark.long
def test_scan_and_remat_change_nothing():
    model = parameters.initialise(ZImageTransformer2DModel, {**CONFIG, "n_refiner_layers": 2}, 0)
    structure, params = parameters.split(model)
    args = tuple(map(jnp.asarray, inputs(4, 6, (7, 32, 45))))

    def run(how):
        def loss(params):
            model = parameters.merge(structure, params)
            model.execution = how
            return (model(*args) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    want, wanted = run(Execution())
    got, gradient = run(Execution(scan=True, remat="block"))
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    for path, g in wanted.items():
        bound = 2e-5 * max(np.abs(g).max(), 1e-6)
        np.testing.assert_allclose(gradient[path], g, atol=bound, err_msg=path)


def test_the_published_model_has_its_number_of_parameters():
    config = families.PUBLISHED["z_image"].model
    shapes = parameters.shapes(parameters.abstract(ZImageTransformer2DModel, config))
    assert sum(x.size for x in shapes.values()) == 6_154_908_736
    assert len(shapes) == 521


def test_more_positions_than_the_model_has_are_refused():
    model = parameters.abstract(ZImageTransformer2DModel, CONFIG)
    with pytest.raises(ValueError, match=r"20 x 5 patches .*axes_lens=\[128, 16, 16\]"):
        jax.eval_shape(lambda model, args: model(*args), model, inputs(40, 10, (7, 8, 9)))


@pytest.mark.long
def test_a_sharded_model_computes_the_same(monkeypatch):
    config = {**CONFIG, "dim": 32, "n_heads": 2, "n_layers": 1}
    model = parameters.initialise(ZImageTransformer2DModel, config, 0)
    latents, _, context, _ = inputs(4, 6, (7, 7, 7, 7))
    args = (latents, np.linspace(0, 1, 4, dtype=np.float32), context, np.int32([7, 32, 45, 64]))
    parity.check_sharded(model, args, monkeypatch)


def test_rules_are_the_layers_own():
    targets = ("to_q", "to_out.0", "feed_forward.w1", "feed_forward.w2")
    parity.check_rules(parameters.abstract(ZImageTransformer2DModel, CONFIG), targets)

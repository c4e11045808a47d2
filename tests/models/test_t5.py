"""T5's encoder against transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

from dmpo_jax import diffusers_io
from dmpo_jax.models import parameters, t5
from tests.models.test_models import relative_error
from tests.support import torch_models

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_states(tmp_path):
    """Longer than the largest distance, so that every bucket is in use."""
    theirs = torch_models.t5()
    theirs.save_pretrained(tmp_path)
    ours = diffusers_io.load_text_encoder(tmp_path)
    ids = np.random.default_rng(0).integers(0, 61, (2, 200))
    ids[:, 50:] = 0  # padding, which is attended to
    with torch.no_grad():
        want = theirs(torch.tensor(ids), output_hidden_states=True)
    structure, params = parameters.split(ours)
    got = jax.jit(lambda p, x: parameters.merge(structure, p)(x))(params, jnp.asarray(ids))
    assert relative_error(got.last_hidden_state, want.last_hidden_state) <= 1e-5
    for a, b in zip(got.hidden_states[:-1], want.hidden_states[:-1], strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize(("count", "largest"), [(32, 128), (16, 40)])
def test_buckets(count, largest):
    positions = torch.arange(512)
    apart = positions[None] - positions[:, None]
    want = T5Attention._relative_position_bucket(apart, True, count, largest)
    got = t5.buckets(512, count=count, largest=largest)
    np.testing.assert_array_equal(got, want)


def test_from_pytorch_and_back_to_the_bit(tmp_path):
    """Older folders hold the embedding twice; ours hold it once, and PyTorch fills both."""
    theirs = torch_models.t5().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    ours = diffusers_io.load_text_encoder(tmp_path / "theirs", param_dtype=jnp.bfloat16)
    diffusers_io.save_text_encoder(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    want, got = theirs.state_dict(), again.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
        ({"added_later": 3}, "added_later=3"),
    ],
)
def test_other_configs_are_refused_by_name(changes, match):
    with pytest.raises(ValueError, match=match):
        parameters.abstract(t5.T5EncoderModel, torch_models.T5 | changes)

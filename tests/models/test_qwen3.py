"""Parity of Qwen3's states with transformers, of a complete model and of its first layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

from dmpo_jax import diffusers_io
from dmpo_jax.models import parameters
from dmpo_jax.models.qwen3 import Qwen3Model
from tests.support.torch_models import randomise

CONFIG = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # heads times this is not the width, as in Qwen3-4B
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
# config.json of Qwen/Qwen3-4B on the hub.
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1000000,
}


def written(kind, folder, **changes):
    theirs = getattr(transformers, kind)(transformers.Qwen3Config(**{**CONFIG, **changes}))
    randomise(theirs).save_pretrained(folder)
    return theirs


def ids_and_mask():
    ids = np.random.default_rng(0).integers(0, 99, (3, 21))
    return ids, np.arange(21)[None] < np.array([[21], [13], [2]])


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), theirs.numpy().astype(np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("kind", "padded", "layers", "states"),
    [
        ("Qwen3ForCausalLM", True, 2, 3),
        ("Qwen3Model", False, -1, 3),
        ("Qwen3Model", True, None, 4),
    ],
)
def test_states_are_those_of_transformers(kind, padded, layers, states, tmp_path):
    theirs = written(kind, tmp_path)
    ours = diffusers_io.load_text_encoder(tmp_path, layers=layers)
    ids, valid = ids_and_mask()
    told = {"attention_mask": torch.tensor(valid).long()} if padded else {}
    with torch.no_grad():
        want = theirs(torch.tensor(ids), output_hidden_states=True, **told).hidden_states
    given = (jnp.asarray(valid.astype(np.int32)),) if padded else ()
    got = jax.jit(lambda *given: ours(*given))(jnp.asarray(ids), *given)
    assert len(got.hidden_states) == states
    for a, b in zip(got.hidden_states, want, strict=False):
        assert relative_error(a, b) <= 1e-5  # of padding too: klein's transformer reads it
    assert relative_error(got.last_hidden_state, want[states - 1]) <= 1e-5


@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Qwen3Model"])
def test_a_folder_is_written_back_bit_for_bit(kind, tmp_path):
    written(kind, tmp_path / "theirs", tie_word_embeddings=True)
    diffusers_io.save_text_encoder(
        diffusers_io.load_text_encoder(tmp_path / "theirs"), tmp_path / "ours"
    )
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)


def test_tensors_of_layers_that_are_not_read_are_ignored(tmp_path):
    written("Qwen3ForCausalLM", tmp_path, tie_word_embeddings=False)  # with an lm_head
    ours = diffusers_io.load_text_encoder(tmp_path, layers=1)
    assert {path.split(".")[0] for path in parameters.shapes(ours)} == {"embed_tokens", "layers"}
    assert len(ours.layers) == 1


def test_the_published_model_has_its_number_of_parameters():
    for layers, count in ((None, 4_022_468_096), (27, 3_114_088_192)):
        make = lambda config, layers=layers, **kw: Qwen3Model(config, layers=layers, **kw)  # noqa: E731
        model = parameters.abstract(make, QWEN3_4B)
        assert sum(x.size for x in parameters.shapes(model).values()) == count


@pytest.mark.parametrize(
    ("changes", "layers", "match"),
    [
        ({"attention_bias": True}, None, "attention_bias=True"),
        ({"num_key_value_heads": 3}, None, "num_key_value_heads=3 must divide"),
        ({"rope_parameters": {"rope_type": "yarn"}}, None, "rope_type='yarn'"),
        ({"layer_types": ["sliding_attention"] * 3}, None, "layer_types"),
        ({}, 4, "num_hidden_layers=3, but 4 layers are read"),
    ],
)
def test_configs_that_are_not_supported_are_refused(changes, layers, match):
    with pytest.raises(ValueError, match=match):
        Qwen3Model({**CONFIG, **changes}, layers=layers, rngs=nnx.Rngs(0))

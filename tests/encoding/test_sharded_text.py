"""Text encoders sharded over devices: a share of the memory each, and the same embeddings."""

import dataclasses
import gc

import jax
import numpy as np
import pytest
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.data import sources
from dmpo_jax.diffusers_io import components
from dmpo_jax.encoding import encode as encoding
from dmpo_jax.encoding import parts
from dmpo_jax.families import SD3, Z_IMAGE
from dmpo_jax.models import parameters
from dmpo_jax.parallel import meshes
from dmpo_jax.toy import debug
from tests.support import tiny

TOKENS = 16
PROMPTS = ["", "the digit three", "a handwritten nine, a handwritten two", "zero"]


def shortened(family):
    return dataclasses.replace(
        family, text=tuple(p._replace(tokens=p.tokens and TOKENS) for p in family.text)
    )


def make_mesh(count=8):
    return meshes.make_mesh(devices=jax.devices()[:count], data=1, fsdp=-1)


def held(pipeline):
    """{device: bytes of the text encoders}."""
    found = dict.fromkeys(jax.devices(), 0)
    for encoder in pipeline.text_encoders:
        for x in parameters.split(encoder)[1].values():
            for shard in x.addressable_shards:
                found[shard.device] += shard.data.nbytes
    return found


# SD3's are two CLIPs and T5, Z-Image's is Qwen3.
@pytest.fixture(scope="module", params=[SD3, Z_IMAGE], ids=lambda family: family.name)
def bare(request, tmp_path_factory):
    """A tiny pipeline without its text encoders, on a family with fewer tokens."""
    folder = epath.Path(tmp_path_factory.mktemp("text") / "model")
    debug.write_tiny_pipeline(folder, request.param)
    loaded = diffusers_io.load_pipeline(folder, text=False)
    assert not loaded.text_encoders
    return loaded._replace(family=shortened(request.param))


@pytest.mark.long
def test_eight_devices_embed_as_one_does_and_hold_a_share_each(bare, monkeypatch):
    one = diffusers_io.with_text(bare)
    monkeypatch.setattr(meshes, "SHARDED_FROM", 128)  # these arrays are tiny
    many = diffusers_io.with_text(bare, mesh=make_mesh())
    total = sum(held(one).values())
    shares = list(held(many).values())
    assert len(set(shares)) == 1
    assert total / 8 <= shares[0] < total / 6  # norms and biases are held by all
    wanted = list(diffusers_io.embed_prompts(one, PROMPTS, batch_size=4))
    got = list(diffusers_io.embed_prompts(many, PROMPTS, batch_size=4))
    assert len(got) == len(PROMPTS)
    for found, want in zip(got, wanted, strict=True):
        for name, x in want._asdict().items():
            y = getattr(found, name)
            assert (x is None) == (y is None)
            if x is not None:
                np.testing.assert_allclose(y, x, rtol=2e-5, atol=2e-6, err_msg=name)
    # One device's share of another number of devices.
    assert diffusers_io.with_text(many) is many
    two = diffusers_io.with_text(bare, mesh=make_mesh(2))
    got = next(iter(diffusers_io.embed_prompts(two, PROMPTS[1:2], batch_size=1)))
    np.testing.assert_allclose(got.context, wanted[1].context, rtol=2e-5, atol=2e-6)


@pytest.mark.long
def test_encode_holds_text_encoders_only_while_it_embeds(tmp_path, monkeypatch, caplog):
    """Sharded, and not at all where the prompts are there already."""
    monkeypatch.setattr(meshes, "SHARDED_FROM", 128)
    model = epath.Path(tmp_path / "model")
    debug.write_tiny_pipeline(model, tiny.FAMILY)
    sources.write_pick_a_pic(tmp_path / "pairs.parquet", debug.synthetic_pairs(16))
    source = f"pickapic:{tmp_path / 'pairs.parquet'}"
    loads, load = [], components.load_text_encoder

    def loading(*args, **kw):
        encoder = load(*args, **kw)
        table = encoder.text_model.embeddings.token_embedding.embedding[...]
        loads.append(table.sharding.shard_shape(table.shape) + table.shape)
        return encoder

    tables = []

    def write_pairs(*args):
        gc.collect()
        (rows, width, *whole) = loads[0]
        shapes = {(rows, width), tuple(whole)}
        tables.append([x.shape for x in jax.live_arrays() if x.shape in shapes])
        return write(*args)

    write = encoding.encode_pairs.write_pairs
    monkeypatch.setattr(components, "load_text_encoder", loading)
    monkeypatch.setattr(encoding.encode_pairs, "write_pairs", write_pairs)
    caplog.set_level("INFO")
    pipeline = diffusers_io.load_pipeline(model, text=False)
    monkeypatch.setattr(tiny.diffusers_io, "load_pipeline", lambda folder: pipeline)
    tiny.encode(source, model, tmp_path / "out")
    ((rows, width, *whole),) = loads
    assert [rows, 8 * width] == whole
    assert tables == [[]]
    assert "text encoders: " in caplog.text
    assert "(8 devices)" in caplog.text
    (tmp_path / "out" / "encoded.json").unlink()
    tiny.encode(source, model, tmp_path / "out")  # resumed: all prompts are there
    assert len(loads) == 1


def test_the_memory_of_text_encoders_is_told(bare):
    said = parts.describe_memory(diffusers_io.with_text(bare, mesh=make_mesh(4)))
    assert "(4 devices)" in said

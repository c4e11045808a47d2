"""Tests for dmpo_jax/data/encoded/meta.py."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dmpo_jax.data.batches import pipeline
from dmpo_jax.data.batches.mixture import Mixture
from dmpo_jax.data.encoded import records
from dmpo_jax.data.encoded.meta import (
    Arrays,
    ArraySpec,
    EncodedMeta,
    differences,
)
from dmpo_jax.families import SDXL, SDXL_EDIT
from dmpo_jax.families.sdxl import SDXL_BASE
from tests.support.encoded import META, make_pair, make_prompts, write

FULL = EncodedMeta(
    model="a/model",
    scaling_factor=(0.5, 2.0),
    shift_factor=(0.25, 0.0),
    arrays=Arrays(
        moments=ArraySpec((2, 4, 6, 8), "bfloat16"),
        context=ArraySpec((5, 7), "float16"),
        pooled=ArraySpec((4,), "float16"),
        length=ArraySpec((), "int32"),
        image=ArraySpec((4, 6, 5), "bfloat16"),
        flipped=ArraySpec((2, 4, 6, 8), "bfloat16"),
    ),
    moments="sample",
    image_kind="edit",
    pack=2,
    told_sizes=True,
    vae="a/vae",
    content={"vae": "00", "text_encoder": "11"},
    source="pickapic:x",
    resolution=48,
    validation_fraction=0.5,
    crop="random",
    ties="drop",
    skipped={"no image": 2},
    tied_pairs=1,
    split_by="prompt",
    counts={"train": 3, "prompts": 4},
    prompt_shards=(4,),
    files={"x": 12},
    hashes={"x": "ab"},
    source_files={"a.parquet": "cd"},
    other={"mine": [1]},
)


def test_round_trip(tmp_path):
    """Through JSON, by the keys that a reader of encoded.json looks for."""
    assert EncodedMeta.from_json(json.loads(json.dumps(FULL.to_json()))) == FULL
    FULL.save(tmp_path)
    assert EncodedMeta.load(tmp_path) == FULL
    written = json.loads((tmp_path / records.MARKER).read_text())
    assert written["shapes"]["moments"] == {"shape": [2, 4, 6, 8], "dtype": "bfloat16"}
    assert written["shapes"]["flipped_image"] is None
    assert (written["moments_dtype"], written["flipped"], written["mine"]) == (
        "bfloat16",
        True,
        [1],
    )
    assert EncodedMeta.load(tmp_path / "absent") is None


def test_what_it_says_of_latents():
    assert FULL.latent_channels == 4
    assert FULL.latents == (2, 3, 16)
    assert FULL.image_optional
    mean = dataclasses.replace(FULL, moments="mean", pack=1, image_kind="")
    assert mean.latent_channels == 8
    assert mean.latents == (4, 6, 8)
    assert not mean.image_optional


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"model": None}, "model should be str, but is None"),
        ({"pack": "2"}, "pack should be int, but is '2'"),
        ({"moments": "median"}, 'should be "sample" or "mean", but are'),
        ({"shapes": None}, "shapes should say what each array is, but is None"),
        ({"shapes": {"moments": {"shape": [2, 4]}}}, r"shapes\.moments should be a shape"),
        ({"scaling_factor": ...}, r"\['scaling_factor'\] is missing"),
    ],
)
def test_a_damaged_one_is_refused_in_words(tmp_path, damage, words):
    values = {**FULL.to_json(), **damage}
    values = {name: value for name, value in values.items() if value is not ...}
    (tmp_path / records.MARKER).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"encoded\.json.*{words}.*run encode again"):
        EncodedMeta.load(tmp_path)


def test_another_format_is_refused(tmp_path):
    (tmp_path / records.MARKER).write_text(json.dumps({**FULL.to_json(), "format": 1}))
    with pytest.raises(ValueError, match="has format 1, but this version reads 2 and 3"):
        EncodedMeta.load(tmp_path)


def test_a_batch_is_described_once(tmp_path):
    """The batch of the reader, of a plan and of zeros have the same shapes."""
    write(tmp_path, prompts=make_prompts(pooled=True))
    pairs = records.open_pairs(tmp_path)
    real = next(pipeline.make_batches(pairs, "train", global_batch=4, rows=range(4), seed=0))

    def described(batch):
        return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), batch)

    assert described(real) == described(pairs.meta.abstract_batch(4))
    assert described(real) == described(pairs.meta.zeros(4))
    assert real.condition.sizes.shape == (4, 2, 6)
    assert described(FULL.empty(3)).condition.lengths == ((3,), np.dtype("int32"))


def test_lengths_of_prompts_reach_the_batch(tmp_path):
    lengths = [1, 3, 5]
    prompts = [
        prompt._replace(length=np.array(length, np.int32))
        for prompt, length in zip(make_prompts(), lengths, strict=True)
    ]
    write(tmp_path, prompts=prompts)
    pairs = records.open_pairs(tmp_path)
    assert pairs.meta.arrays.length == ArraySpec((), "int32")
    batch = next(
        pipeline.make_batches(
            pairs, "train", global_batch=8, rows=range(8), seed=0, prompt_dropout=0.0
        )
    )
    context = batch.condition.context[:, 0, 0].astype(int)  # the prompt's number
    np.testing.assert_array_equal(batch.condition.lengths, np.array(lengths)[context])
    bad = [prompts[0]._replace(length=np.array(6, np.int32)), *prompts[1:]]
    with pytest.raises(ValueError, match=r"prompt 0 .*length should be an int32 in \[1, 5\]"):
        write(tmp_path / "bad", prompts=bad)


def test_what_encode_is_expected_to_make():
    meta = EncodedMeta.expected(
        SDXL_EDIT,
        SDXL_EDIT.facts({**SDXL_BASE, "in_channels": 8}),
        size=(8, 8),
        latent_channels=4,
        tokens=77,
        scaling_factor=0.13025,
        moments="mean",
    )
    assert meta.arrays.moments == ((2, 8, 8, 4), "bfloat16")
    assert meta.arrays.context == ((77, 2048), "float16")
    assert meta.arrays.pooled == ((1280,), "float16")
    assert meta.arrays.image == ((8, 8, 4), "bfloat16")
    assert meta.told_sizes == SDXL.told_sizes
    assert EncodedMeta.from_json(meta.to_json()) == meta


def test_content_counts_where_it_is_known():
    """Folders of the same content may be called otherwise; other content never passes."""
    have = {"model": "a", "vae": "", "crop": "center", "content": {"vae": "0"}}
    assert not differences(have, have)
    assert not differences(have, {**have, "model": "b"})
    other = {**have, "content": {"vae": "1"}}
    assert differences(have, other) == {"weights of vae": ("0", "1")}
    earlier = {**have, "source_files": {"a": "0"}}
    assert not differences(have, earlier)  # a version that did not know
    assert differences(earlier, {**have, "source_files": {"a": "1"}}) == {
        "content of a": ("0", "1")
    }
    unknown = {**have, "content": {}}
    assert differences(have, {**unknown, "model": "b"}) == {"model": ("a", "b")}
    assert differences(have, {**unknown, "crop": "random"}) == {"crop": ("center", "random")}


def test_a_mixture_of_one_content_under_two_names(tmp_path):
    for name, content in (("a", "0"), ("b", "0"), ("c", "1")):
        meta = {**META, "model": name, "content": {"vae": content}}
        write(tmp_path / name, {"train": [make_pair(0)]}, meta=meta)
    a, b, c = (records.open_pairs(tmp_path / name) for name in "abc")
    assert Mixture([a, b], [1, 1]).meta.counts["train"] == 2
    with pytest.raises(ValueError, match=r"weights of vae: '0' and '1'"):
        Mixture([a, c], [1, 1])


def test_an_edit_or_damage_of_it_is_seen(tmp_path):
    FULL.save(tmp_path)
    marker = tmp_path / records.MARKER
    values = json.loads(marker.read_text())
    marker.write_text(json.dumps(values))  # written otherwise, but the same
    assert EncodedMeta.load(tmp_path) == FULL
    edited = {**values, "scaling_factor": [0.5, 2.5]}
    marker.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=r"encoded\.json is not as encode wrote it"):
        EncodedMeta.load(tmp_path)
    del edited["digest"]  # as the message says
    marker.write_text(json.dumps(edited))
    assert EncodedMeta.load(tmp_path).scaling_factor == (0.5, 2.5)


def test_its_identity_is_of_what_training_reads(tmp_path):
    moved = dataclasses.replace(FULL, model="b", vae="c", source="d", skipped={})
    assert moved.identity == FULL.identity
    for change in ({"hashes": {"x": "ba"}}, {"scaling_factor": (0.5, 2.1)}, {"pack": 1}):
        assert dataclasses.replace(FULL, **change).identity != FULL.identity

"""`encode --prompts=FOLDER`: embeddings that another program made, and no text encoder."""

import json
import shutil

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from dmpo_jax import diffusers_io
from dmpo_jax.data import sources
from dmpo_jax.data.encoded import records
from dmpo_jax.data.sources.bad_records import TooManyBadError
from dmpo_jax.diffusers_io import components
from dmpo_jax.encoding import given
from dmpo_jax.jobs import encode
from dmpo_jax.jobs.run import run
from dmpo_jax.toy import debug
from tests.support import outside_family, tiny

LEAVES = {"data__validation_fraction": 0.0, "train__steps": 2, "log__validate_every": 0}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with outside_family.registered():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, _registered):
    """Folder of `model`, `bare` (without text encoder), `pairs.parquet` and the encoded `whole`."""
    folder = tmp_path_factory.mktemp("given")
    outside_family.write(folder / "model")
    shutil.copytree(folder / "model", folder / "bare")
    shutil.rmtree(folder / "bare" / "text_encoder")
    shutil.rmtree(folder / "bare" / "tokenizer")
    sources.write_pick_a_pic(folder / "pairs.parquet", debug.synthetic_pairs(20))
    encode.encode(configure(folder, "model"), out=folder / "whole")
    return folder


def configure(folder, model="bare", **leaves):
    values = {**LEAVES, "data__source": f"pickapic:{folder / 'pairs.parquet'}", **leaves}
    return tiny.make_config(str(folder / model), "", **values)


def embed(made, out, texts=None, lines=False):
    """Writes as a script elsewhere would: two files of tensors in float32, prompts in any order."""
    pairs = records.open_pairs(made / "whole")
    texts = [p.text for p in reversed(list(pairs.prompts))] if texts is None else texts
    pipeline = diffusers_io.load_pipeline(made / "model")
    found = list(diffusers_io.embed_prompts(pipeline, texts))
    out.mkdir()
    for i, part in enumerate((found[:4], found[4:])):
        tensors = {
            "context": np.stack([x.context for x in part]),
            "lengths": np.array([int(x.lengths) for x in part], np.int64),
        }
        save_file(tensors, out / f"embeddings-{i}.safetensors")
    if lines:
        rows = [json.dumps(t if i % 2 else {"prompt": t}) for i, t in enumerate(texts)]
        (out / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    else:
        (out / "prompts.txt").write_text("".join(f"{text}\n" for text in texts))
    return str(out)


def refuse(*args, **kw):
    raise AssertionError("a text encoder is loaded")


def contents(folder):
    pairs = records.open_pairs(folder)
    prompts = [pairs.prompts[j] for j in range(len(pairs.prompts))]
    return prompts, list(pairs.split("train")), pairs.meta


def assert_same(folder, other):
    """Equal but for embeddings, which another program may round otherwise before they are cut."""
    (ours, pairs, _), (theirs, others, _) = contents(folder), contents(other)
    assert [p.text for p in ours] == [p.text for p in theirs]
    for a, b in zip([*ours, *pairs], [*theirs, *others], strict=True):
        for name, x in b._asdict().items():
            if name == "context":
                got, want = (y.astype(np.float32) for y in (getattr(a, name), x))
                np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-5)
                assert (got != want).mean() < 0.01
            else:
                np.testing.assert_array_equal(getattr(a, name), x, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["text", "lines", "encoded"])
def test_pairs_are_those_of_the_text_encoders_without_them(layout, made, tmp_path, monkeypatch):
    prompts = str(made / "whole")
    if layout != "encoded":
        prompts = embed(made, tmp_path / "prompts", lines=layout == "lines")
    monkeypatch.setattr(components, "load_text_encoder", refuse)
    config = configure(made, data__prompts=prompts)
    encode.encode(config, out=tmp_path / "out")
    assert_same(tmp_path / "out", made / "whole")
    meta = contents(tmp_path / "out")[2]
    assert set(meta.content) == {"vae"}
    assert len(meta.other["prompts_content"]) == 64
    assert not meta.skipped


@pytest.mark.long
def test_a_folder_without_text_encoders_encodes_and_trains(made, tmp_path, monkeypatch):
    prompts = embed(made, tmp_path / "prompts")
    monkeypatch.setattr(components, "load_text_encoder", refuse)
    leaves = {"jobs": ("encode", "train"), "log__sample_every": 2, "sample__steps": 2}
    run(configure(made, data__prompts=prompts, sample__count=1, **leaves), tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "2.png").exists()
    assert (tmp_path / "run" / "export" / "model_index.json").exists()


@pytest.mark.long
def test_pairs_of_prompts_without_embedding_are_skipped_and_counted(made, tmp_path, caplog):
    texts = [p.text for p in contents(made / "whole")[0]]
    gone = texts[3]
    prompts = embed(made, tmp_path / "prompts", [t for t in texts if t != gone])
    whole = contents(made / "whole")[1]
    missing = sum(texts[pair.prompt] == gone for pair in whole)
    config = configure(made, data__prompts=prompts, data__max_bad=0.2)
    encode.encode(config, out=tmp_path / "out")
    found, pairs, meta = contents(tmp_path / "out")
    assert meta.skipped == {"no embedding": missing}
    assert len(pairs) == len(whole) - missing > 0 < missing
    assert [p.text for p in found] == [t for t in texts if t != gone]
    assert f"1 of {len(texts) - 1} prompts have no embedding in {prompts}" in caplog.text
    few = embed(made, tmp_path / "few", texts[:5])
    with pytest.raises(TooManyBadError, match=r"no embedding"):
        encode.encode(configure(made, data__prompts=few), out=tmp_path / "few_out")


@pytest.mark.long
def test_other_embeddings_are_another_encoding(made, tmp_path):
    first = embed(made, tmp_path / "first")
    encode.encode(configure(made, data__prompts=first), out=tmp_path / "out")
    moved = shutil.move(first, tmp_path / "moved")
    encode.encode(configure(made, data__prompts=str(moved)), out=tmp_path / "out")  # done
    texts = (tmp_path / "moved" / "prompts.txt").read_text().splitlines()
    other = embed(made, tmp_path / "other", texts[::-1])
    with pytest.raises(ValueError, match=r"another encoding \(prompts_content: '\w+' there"):
        encode.encode(configure(made, data__prompts=other), out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"another encoding .*weights of text_encoder: 'none'"):
        encode.encode(configure(made, "model"), out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"another encoding .*prompts_content: None there"):
        encode.encode(configure(made, data__prompts=other), out=made / "whole")


def write(folder, texts=("", "a"), name="prompts.txt", **tensors):
    folder.mkdir()
    given = {
        "context": np.zeros((2, 6, 32), np.float32),
        "lengths": np.array([1, 6], np.int32),
        **tensors,
    }
    save_file({k: x for k, x in given.items() if x is not None}, folder / "x.safetensors")
    (folder / name).write_text("".join(f"{text}\n" for text in texts))
    return str(folder)


ZEROS = np.zeros((2, 6, 32), np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": ("a", "b")}, r"no embedding of the empty prompt.*add an empty line"),
        ({"context": ZEROS[..., :24]}, "context of width 24, but the model attends to width 32"),
        ({"pooled": ZEROS[:, 0]}, r"pooled embeddings of width 32, but the model takes 0"),
        ({"lengths": None}, "lacks lengths.* a outside model takes"),
        ({"texts": ("", "a", "b")}, "lists 3 prompts, but the tensors beside it have 2 rows"),
        ({"context": None}, "should hold context and.*but holds lengths"),
        ({"other": ZEROS}, "should hold context and.*but holds context, lengths, other"),
        ({"lengths": np.array([1], np.int32)}, r"should hold context \[N, S, D\]"),
        ({"context": ZEROS[:, 0]}, r"should hold context \[N, S, D\]"),
        ({"name": "names.txt"}, r"should hold prompts\.txt or prompts\.jsonl.*found names\.txt"),
        ({"name": "prompts.jsonl", "texts": ('""', "a")}, "line 2: should be a JSON string"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(changes, words, made, tmp_path):
    prompts = write(tmp_path / "prompts", **changes)
    with pytest.raises(ValueError, match=words):
        encode.check(configure(made, data__prompts=prompts))


def test_a_missing_folder_and_a_damaged_file_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere should hold prompts\.txt .* found nothing"):
        encode.check(configure(made, data__prompts=str(tmp_path / "nowhere")))
    prompts = epath.Path(write(tmp_path / "prompts"))
    save_file({"context": ZEROS[:, :5], "lengths": np.ones(2, np.int32)}, prompts / "y.safetensors")
    with pytest.raises(ValueError, match=r"y\.safetensors holds .*all files should hold the same"):
        encode.check(configure(made, data__prompts=str(prompts)))
    data = (prompts / "x.safetensors").read_bytes()
    (prompts / "x.safetensors").write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read as safetensors"):
        encode.check(configure(made, data__prompts=str(prompts)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": ZEROS + np.inf}, "embedding of 'a' is not finite as bfloat16"),
        ({"context": ZEROS.astype(np.int32)}, "context should be floats, but is int32"),
        ({"lengths": np.array([1, 7])}, r"has 7 positions of text \(lengths\), .* 1 to 6"),
        ({"lengths": np.array([1, 0])}, r"has 0 positions of text"),
    ],
)
def test_numbers_that_are_none_are_refused_when_they_are_read(changes, words, made, tmp_path):
    prompts = write(tmp_path / "prompts", **changes)
    with given.open_given(prompts, made / "bare") as found:
        assert "a" in found
        with pytest.raises(ValueError, match=words):
            found["a"]

"""Tests for dmpo_jax/data/prompt_files.py: every format gives the same prompts, or says why not."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmpo_jax.data.prompt_files import Prompt, load_prompts
from dmpo_jax.errors import UserError


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return path


def test_a_line_a_prompt(tmp_path):
    file = write(tmp_path / "prompts.txt", "\ufeffa cat\n\n  a dog, asleep \r\n007\n")
    assert load_prompts(file) == [Prompt("a cat"), Prompt("a dog, asleep"), Prompt("007")]
    assert load_prompts(write(tmp_path / "prompts", "a cat"))[0].text == "a cat"


def formats(tmp_path):
    """The same three rows in every format that has columns."""
    rows = [
        {"prompt": "a cat, asleep", "seed": 7, "negative_prompt": "dull", "id": 3},
        {"prompt": "007", "image": "in/a.png", "mask": "m.png", "id": 4},
        {"prompt": 'say "hi"', "id": 5},
    ]
    columns = ("id", "prompt", "negative_prompt", "seed", "image", "mask")
    table = {c: [row.get(c) for row in rows] for c in columns}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")

    def delimited(mark):
        def cell(value):
            value = "" if value is None else str(value)
            return '"' + value.replace('"', '""') + '"' if '"' in value or mark in value else value

        lines = [mark.join(columns)]
        lines += [mark.join(cell(row.get(c)) for c in columns) for row in rows]
        return "\n".join(lines) + "\n"

    write(tmp_path / "a.csv", delimited(","))
    write(tmp_path / "a.tsv", delimited("\t"))
    write(tmp_path / "a.json", json.dumps(rows))
    write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    return [tmp_path / f"a.{kind}" for kind in ("parquet", "csv", "tsv", "json", "jsonl")]


def test_every_format_gives_the_same(tmp_path):
    want = [
        Prompt("a cat, asleep", negative_prompt="dull", seed=7),
        Prompt("007", image=str(tmp_path / "in/a.png"), mask=str(tmp_path / "m.png")),
        Prompt('say "hi"'),
    ]
    for file in formats(tmp_path):
        assert load_prompts(file) == want, file.name


def test_what_people_have(tmp_path):
    parti = "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tA note\nit's\tWorld\t\t\n"
    assert load_prompts(write(tmp_path / "PartiPrompts.tsv", parti)) == [
        Prompt("bond", category="Abstract"),
        Prompt("it's", category="World"),
    ]
    assert load_prompts(write(tmp_path / "hps.json", '["a cat", "a dog"]')) == [
        Prompt("a cat"),
        Prompt("a dog"),
    ]
    table = pa.table({"caption": ["a cat"], "jpg_0": [b"\xff"], "seed": [2**32 - 1]})
    pq.write_table(table, tmp_path / "pick.parquet")
    assert load_prompts(tmp_path / "pick.parquet") == [Prompt("a cat", seed=2**32 - 1)]
    lines = write(tmp_path / "a.jsonl", '"a cat"\n{"prompt": "a dog", "negative_prompt": ""}\n')
    assert load_prompts(lines) == [Prompt("a cat"), Prompt("a dog", negative_prompt="")]
    assert load_prompts(write(tmp_path / "b.json", '["", {"prompt": "a"}]'))[0] == Prompt("")
    refl = write(tmp_path / "refl.json", '[{"id": "007-1", "text": "a cat"}]')
    assert load_prompts(refl) == [Prompt("a cat")]
    spo = write(tmp_path / "spo.json", '[{"caption": "a cat", "trainset_idx": 3}]')
    assert load_prompts(spo) == [Prompt("a cat")]
    geneval = '{"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}\n'
    assert load_prompts(write(tmp_path / "g.jsonl", geneval)) == [
        Prompt("a cat", category="colors")
    ]
    draw = write(tmp_path / "draw.csv", "Prompts,Category\na cat,Colors\na dog,\n")
    assert load_prompts(draw) == [Prompt("a cat", category="Colors"), Prompt("a dog")]
    style = '[{"prompt": "a cat", "style": "anime", "neg_prompt": "dull"}]'
    assert load_prompts(write(tmp_path / "s.json", style)) == [
        Prompt("a cat", "dull", None, None, None, "anime")
    ]


# As in PartiPrompts.tsv: tab-separated, no cell quoted, quotation marks part of the text.
UNQUOTED = (
    "Prompt\tCategory\tNote\n"
    '"H I" on a wall\tArts\t\n'
    'a sign that says "no"\tArts\tsee "Signs"\n'
    '"all of it"\tArts\t\n'
    'a 5" nail \tArts\t"\n'
)


def test_quotation_marks_of_an_unquoted_tsv_are_text(tmp_path):
    found = load_prompts(write(tmp_path / "a.tsv", UNQUOTED))
    assert [prompt.text for prompt in found] == [
        '"H I" on a wall',
        'a sign that says "no"',
        '"all of it"',
        'a 5" nail ',
    ]
    assert {prompt.category for prompt in found} == {"Arts"}
    quoted = 'prompt\tseed\n"a\tcat,\nasleep"\t1\n"say ""hi"""\t2\na 5" nail\t3'
    found = load_prompts(write(tmp_path / "b.tsv", quoted.replace("\n", "\r\n")))
    assert [prompt.text for prompt in found] == ["a\tcat,\r\nasleep", 'say "hi"', 'a 5" nail']
    with pytest.raises(ValueError, match=r"c\.tsv, row 2: has 1 cells, but the header has 2: '\"a"):
        load_prompts(write(tmp_path / "c.tsv", 'prompt\tseed\nb\t1\n"a\n'))


def test_each_of_several_files_is_a_category(tmp_path):
    anime = write(tmp_path / "anime.json", '["a cat", "a dog"]')
    photo = write(tmp_path / "photo.jsonl", '"a cat"\n{"prompt": "a cup", "tag": "things"}\n')
    want = [("a cat", "anime"), ("a dog", "anime"), ("a cat", "photo"), ("a cup", "things")]
    for given in ([anime, photo], f"{anime}, {photo}"):
        found = load_prompts(given)
        assert [(prompt.text, prompt.category) for prompt in found] == want
    assert load_prompts(anime) == [Prompt("a cat"), Prompt("a dog")]
    assert load_prompts(write(tmp_path / "a,b.txt", "a cat")) == [Prompt("a cat")]
    with pytest.raises(ValueError, match=r"none\.txt does not exist"):
        load_prompts(f"{anime},{tmp_path}/none.txt")


def test_prompt_weights_are_literal_and_said_to_be(tmp_path, caplog):
    file = write(tmp_path / "a.txt", "a (red:1.3) cat\na (red) cat at 10:30\n")
    assert load_prompts(file)[0].text == "a (red:1.3) cat"
    assert "1 prompts weight words" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "holds no prompt"),
        ("a.csv", "words,seed\na cat,1\n", "has no prompt or .* prompts, but words, seed"),
        ("a.csv", "prompt,seed\na cat,1\na dog,x\n", "row 2: seed should be .*'x'"),
        ("a.csv", "prompt,seed\na cat,1\n,2\n", "row 2: prompt should be a text, but is None"),
        ("a.csv", "prompt,seed\na cat\n", "row 1: has 1 cells, but the header has 2: 'a cat'"),
        ("a.csv", "prompt\na cat\n\xff\n".encode("latin-1"), "row 2: 'utf-8' codec"),
        ("a.csv", "", r"cannot be read as \.csv"),
        ("a.json", '{"prompt": "a"}', "should hold a JSON list, but holds dict"),
        ("a.json", "[", r"cannot be read as \.json"),
        ("a.json", '["a", 3]', "row 2: should be a text or an object, but is 3"),
        ("a.json", '[{"words": "a", "id": 1}]', "row 1: has no prompt or .*, but words, id"),
        ("a.json", '[{"prompt": "a", "tag": 1}]', "row 1: category should be a text, but is 1"),
        ("a.json", '[{"prompt": "a", "seed": -1}]', "row 1: seed should be .*-1"),
        ("a.json", '[{"prompt": "a", "seed": true}]', "row 1: seed should be .*True"),
        ("a.json", '[{"prompt": "a", "seed": 1.5}]', "row 1: seed should be .*1.5"),
        ("a.json", '[{"prompt": "a", "image": 1}]', "row 1: image should be a text, but is 1"),
        ("a.jsonl", '"a"\n{"prompt": }\n', "row 2: Expecting value"),
        ("a.jsonl", '"a"\n' + "[" * 100_000, "row 2: maximum recursion"),
        ("a.json", '["a", ' + "[" * 10**5 + "]" * 10**5 + "]", "row 2: maximum recursion"),
        ("a.jsonl", '{"prompt": "a \\ud83d"}', "row 1: 'utf-8' codec"),
        ("a.jsonl", '{"prompt": "a", "seed": 1e400}', "row 1: seed should be .*inf"),
        ("a.jsonl", '{"prompt": "a", "image": "http://x/y.png"}', "row 1: image .* URL"),
        ("a.txt", "a cat\n".encode("utf-16-le"), "holds zero bytes: save it as UTF-8"),
        ("a.parquet", b"PAR1", r"cannot be read as \.parquet"),
        ("a.txt", b"\xff\xfe", r"cannot be read as \.txt"),
    ],
)
def test_errors_name_file_row_and_columns(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load_prompts(write(tmp_path / name, content))


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.txt does not exist: give one of \.txt, \.json"):
        load_prompts(tmp_path / "nowhere.txt")


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    text = "a cat\u2028asleep\x0ca dog"
    assert [p.text for p in load_prompts(write(tmp_path / "a.txt", text))] == [text]


def test_a_folder_or_a_pipe_is_refused(tmp_path):
    (tmp_path / "a.txt").mkdir()
    os.mkfifo(tmp_path / "b.txt")  # to read it would hang
    for name in ("a.txt", "b.txt"):
        with pytest.raises(UserError, match=f"{name} should be a file, but is a folder, a FIFO"):
            load_prompts(tmp_path / name)

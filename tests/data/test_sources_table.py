"""Tests for dmpo_jax/data/sources/table.py and columns.py: what people write into tables."""

import csv
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmpo_jax.data import sources
from dmpo_jax.data.sources import rows
from tests.support.raw_pairs import (
    check_units,
    image,
    make_bucket,
    read,
    skipped,
    write_images,
)

FORMATS = ["jsonl", "json", "csv", "tsv", "parquet"]


def write(folder, rows, kind="jsonl"):
    """Rows as a table; cells that are lists become JSON in CSV."""
    file = folder / f"t.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=",\t"[kind == "tsv"])
            writer.writeheader()
            lists = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()}
                     for r in rows]  # fmt: skip
            writer.writerows(lists)
    return f"table:{file}"


@pytest.mark.parametrize("kind", FORMATS)
def test_chosen_and_rejected(kind, tmp_path):
    images = write_images(tmp_path / "im", 40)
    prompts = ["007", "2024-01-01", 'say "hi", twice', "two\nlines", *"abcdefghijklmnop"]
    rows = [
        {
            "prompt": p,
            "chosen": f"im/{2 * i}.png",
            "rejected": str(tmp_path / f"im/{2 * i + 1}.png"),
        }
        for i, p in enumerate(prompts)
    ]
    source = sources.open_source(write(tmp_path, rows, kind))
    assert source.given == frozenset()
    for i, pair in enumerate(check_units(source, 20)):
        pictures = (images[2 * i], images[2 * i + 1])
        assert pair == (f"t.{kind}:{i}", prompts[i], pictures, 1.0, None, None)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("names", "values", "preferences"),
    [
        (("label_0",), [(1,), (0,), (0.5,), (0.25,)], [1, 0, 0.5, 0.25]),
        (("label",), [(1,), (0,), (0.5,), (0.25,)], [1, 0, 0.5, 0.25]),
        (("votes_0", "votes_1"), [(3, 1), (0, 2), (2, 2), (1, 0)], [0.75, 0, 0.5, 1]),
        (("score_0", "score_1"), [(3, 1), (-2.5, 2), (0.1, 0.1), (1, 0)], [1, 0, 0.5, 1]),
    ],
)
def test_labels_votes_and_scores(kind, names, values, preferences, tmp_path):
    images = write_images(tmp_path, 2)
    rows = [
        {"caption": "a", "image_0": "0.png", "image_1": "1.png", **dict(zip(names, v, strict=True))}
        for v in values
    ]
    spec = write(tmp_path, rows, kind)
    pairs = check_units(sources.open_source(spec), 4)
    assert [pair.preference for pair in pairs] == preferences
    assert {pair.images for pair in pairs} == {tuple(images)}
    dropping = sources.open_source(spec, ties="drop")
    assert [pair.preference for pair in read(dropping)] == [p for p in preferences if p != 0.5]
    assert skipped(dropping) == {"tie": 1}
    (tie,) = [x for u in dropping.units() for x in dropping.read(u) if hasattr(x, "reason")]
    assert (tie.id, tie.bad) == (f"t.{kind}:2", False)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("names", "better"),
    [(("images", "ranks"), -1), (("images", "scores"), 1), (("generations", "ranking"), -1)],
)
def test_ranked_lists_become_pairs(kind, names, better, tmp_path):
    images = write_images(tmp_path, 5)
    values = [1, 3, 2, 2, 5]
    rows = [
        {"prompt": "a", names[0]: [f"{i}.png" for i in range(5)], names[1]: values},
        {"prompt": "b", names[0]: ["1.png", "0.png"], names[1]: [1, 2]},
    ]
    source = sources.open_source(write(tmp_path, rows, kind))
    pairs = check_units(source, 2)
    assert len(source) == len(pairs) == 10 + 1
    index = {data: i for i, data in enumerate(images)}
    seen = set()
    for pair in pairs[:10]:
        i, j = (index[data] for data in pair.images)
        assert pair.id == f"t.{kind}:0:{i}-{j}"
        assert i < j
        difference = better * (values[i] - values[j])
        assert pair.preference == (0.5 if difference == 0 else float(difference > 0))
        seen.add((i, j))
    assert len(seen) == 10
    assert pairs[10].preference == float(better < 0)
    dropping = sources.open_source(f"table:{tmp_path}/t.{kind}", ties="drop")
    assert len(read(dropping)) == 10
    assert skipped(dropping) == {"tie": 1}


def test_editing_triples(tmp_path):
    images = write_images(tmp_path, 4)
    row = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    rows = [{**row, "source": "2.png", "mask": "3.png"}, {**row, "source": "absent.png"}]
    source = sources.open_source(write(tmp_path, rows))
    assert source.given == {"source", "mask"}
    first, second = check_units(source, 2)
    assert (first.source, first.mask) == tuple(images[2:])
    assert (second.source, second.mask) == (None, None)


def test_parquet_may_hold_the_images(tmp_path):
    images = [image(i) for i in range(4)]
    columns = {
        "prompt": ["a", "b"],
        "image_0": images[:2],
        "image_1": [{"bytes": data, "path": None} for data in images[2:]],
        "votes_0": [3, 1],
        "votes_1": [1, 1],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    first, second = check_units(sources.open_source(f"table:{tmp_path}/t.parquet"), 2)
    assert first[1:4] == ("a", (images[0], images[2]), 0.75)
    assert second[1:4] == ("b", (images[1], images[3]), 0.5)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_large_tables_are_cut(kind, tmp_path):
    write_images(tmp_path, 2)
    row = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    source = sources.open_source(write(tmp_path, [row] * 1001, kind))
    units = source.units()
    assert len(units) == 2
    assert pickle.loads(pickle.dumps(units)) == units
    check_units(source, 1001)


@pytest.mark.long
def test_row_groups_are_kept_together(tmp_path):
    data = image(0)
    row = {"prompt": "a", "chosen": data, "rejected": data}
    rows = [{**row, "prompt": str(i)} for i in range(2161)]
    for size, edges in ((300, [0, 900, 1800, 2161]), (2161, [0, 1080, 2161])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=size)
        source = sources.open_source(f"table:{tmp_path}/t.parquet")
        pairs = [pair for unit in source.units() for pair in source.read(unit)]
        assert [pair.prompt for pair in pairs] == [str(i) for i in range(2161)]
        assert [pair.id for pair in pairs] == [f"t.parquet:{i}" for i in range(2161)]
        assert [unit.start for unit in source.units()] == edges[:-1]


def test_bad_rows_are_skipped_by_reason(tmp_path):
    write_images(tmp_path, 2)
    good = {"prompt": "a", "image_0": "0.png", "image_1": "1.png", "label_0": 1}
    bad = [
        ("no prompt", {"prompt": None}),
        ("no prompt", {"prompt": 7}),
        ("no image", {"image_0": "absent.png"}),
        ("no image", {"image_0": None}),
        ("no image", {"image_1": "."}),
        ("no image", {"image_1": "x" * 5000}),
        ("no image", {"image_1": "a\0b"}),
        ("no image", {"image_1": 3}),
        ("bad label", {"label_0": 1.1}),
        ("bad label", {"label_0": float("nan")}),
        ("bad label", {"label_0": "yes"}),
        ("bad label", {"label_0": [1]}),
    ]
    lines = [json.dumps({**good, **change}) for _, change in bad]
    lines += ["{", "[1]", "[" * 100_000, '"a"']
    (tmp_path / "t.jsonl").write_bytes(
        ("\ufeff" + json.dumps(good) + "\r\n\n" + "\n".join(lines) + "\n").encode() + b'{"\xff"}'
    )
    pair, *skipped = check_units(sources.open_source(f"table:{tmp_path}/t.jsonl"), 18)
    assert pair.prompt == "a"
    reasons = [reason for reason, _ in bad] + ["not JSON", "not JSON", "nested too deeply"]
    reasons += ["not JSON", "not UTF-8"]
    assert [s.reason for s in skipped] == reasons
    assert all(s.bad for s in skipped)
    assert [s.id for s in skipped] == [f"t.jsonl:{i}" for i in range(1, 18)]


@pytest.mark.parametrize(
    ("change", "reason", "bad"),
    [
        ({"votes_0": 0, "votes_1": 0}, "no label", False),
        ({"votes_0": None}, "no label", False),
        ({"votes_0": -1}, "bad label", True),
        ({"votes_0": 1e308, "votes_1": 1e308}, "bad label", True),
    ],
)
def test_votes_that_say_nothing(change, reason, bad, tmp_path):
    write_images(tmp_path, 2)
    row = {"prompt": "a", "image_0": "0.png", "image_1": "1.png", "votes_0": 2, "votes_1": 1}
    source = sources.open_source(write(tmp_path, [{**row, **change}]))
    (got,) = check_units(source, 1)
    assert (got.reason, got.bad) == (reason, bad)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ranks": [1, 2, 3]}, "uneven lists"),
        ({"ranks": [1]}, "uneven lists"),
        ({"ranks": list(range(5000))}, "uneven lists"),
        ({"images": None}, "no image"),
        ({"ranks": "best"}, "bad label"),
        ({"ranks": [1, None]}, "bad label"),
        ({"ranks": None}, "no label"),
    ],
)
def test_bad_lists_are_skipped(change, reason, tmp_path):
    write_images(tmp_path, 2)
    row = {"prompt": "a", "images": ["0.png", "1.png"], "ranks": [1, 2]}
    source = sources.open_source(write(tmp_path, [row, {**row, **change}]))
    pair, skipped = check_units(source, 2)
    assert (pair.preference, skipped.reason) == (1.0, reason)


def test_a_missing_image_of_a_list_costs_its_pairs_alone(tmp_path):
    write_images(tmp_path, 2)
    rows = [{"prompt": "a", "images": ["0.png", "no.png", "1.png"], "ranks": [1, 2, 3]}]
    a, pair, b = check_units(sources.open_source(write(tmp_path, rows)), 1)
    assert (a.reason, b.reason, pair.id) == ("no image", "no image", "t.jsonl:0:0-2")


def test_absurdly_large_files_are_not_read(tmp_path, monkeypatch):
    write_images(tmp_path, 2)
    monkeypatch.setattr(rows, "MAX_BYTES", 10)
    source = sources.open_source(
        write(tmp_path, [{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}])
    )
    (skipped,) = check_units(source, 1)
    assert skipped.reason == "absurd size"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"prompt": "a", "good": 1}', r"chosen, rejected; .*has \['good', 'prompt'\]"),
        ("t.jsonl", "", r"needs the column prompt .*has \[\]"),
        ("t.jsonl", '{"chosen": "a", "rejected": "b"}', r"has \['chosen', 'rejected'\]"),
        ("t.json", "{}", "should hold a JSON list, but holds dict"),
        ("t.json", "[", r"cannot be read as \.json"),
        ("t.csv", "prompt,chosen\na,b\n", r"has \['chosen', 'prompt'\]"),
        ("t.csv", 'prompt,chosen,rejected\n"a,b,c\na,b\n', r"cannot be read as \.csv.*Expected 3"),
        ("t.csv", 'prompt,chosen,rejected\na,b,c\na,b,"c\nd', "a quotation mark is not closed"),
        ("t.csv", "prompt,prompt\na,b\n", r"\['prompt'\] twice"),
        ("t.tsv", b"prompt\tchosen\trej\xffected\na\tb\tc\n", r"cannot be read as \.tsv"),
        ("t.parquet", "PAR1", "not a complete parquet file"),
        ("t.txt", "a", r"one of \.jsonl, .*t\.txt"),
    ],
)
def test_wrong_tables_are_refused_at_once(name, content, message, tmp_path):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sources.open_source(f"table:{tmp_path}/{name}")


def test_what_is_absent_or_unknown(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"t\.jsonl"):
        sources.open_source(f"table:{tmp_path}/t.jsonl")
    with pytest.raises(ValueError, match="'keep' or 'drop', but is 'maybe'"):
        sources.open_source(f"table:{tmp_path}/t.jsonl", ties="maybe")
    data = image(0)
    row = {"prompt": "a", "chosen": data, "rejected": data}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    other = {"prompt": "a", "image_0": data, "image_1": data, "label_0": 1.0}
    pq.write_table(pa.Table.from_pylist([other]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"the same columns, but .*a\.parquet has .*'chosen'"):
        sources.open_source(f"table:{tmp_path}")


def test_label_is_said_to_be_of_image_0(tmp_path, caplog):
    write_images(tmp_path, 2)
    row = {"prompt": "a", "image_0": "0.png", "image_1": "1.png", "label": 1}
    sources.open_source(write(tmp_path, [row]))
    assert "the probability that image_0 is preferred" in caplog.text


def test_object_storage(monkeypatch):
    """A bucket in memory: the table, its images beside it, and parquet."""
    images = [image(i) for i in range(2)]
    store = make_bucket(monkeypatch)
    row = {"prompt": "a", "chosen": "im/0.png", "rejected": "s3://bucket/im/1.png"}
    store.pipe("s3://bucket/t.jsonl", json.dumps(row).encode())
    for i, data in enumerate(images):
        store.pipe(f"s3://bucket/im/{i}.png", data)
    (pair,) = check_units(sources.open_source("table:s3://bucket/t.jsonl"), 1)
    assert pair.images == tuple(images)

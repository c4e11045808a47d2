"""The model card: what it counts, what it tells of, and whose win rates it takes."""

import json

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from dmpo_jax.export import model_card, record, run
from dmpo_jax.toy.debug import write_tiny_pipeline
from tests.support.tiny import FAMILY

JUDGED = {"svm": {"win_rate": 0.75, "win_rate_ci95": [0.7, 0.8]}}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("secret_place") / "model")
    write_tiny_pipeline(folder, FAMILY)
    return folder


def make_card(pipeline, workdir, **changes):
    given = {
        "trained": model_card.Trained(str(pipeline), None, None),
        "objective": "dmpo",
        "pairs_per_update": 8,
        "ema_decay": 0.0,
        "pairs": str(workdir / "encoded"),
        "settings": {"model": {"folder": str(pipeline)}, "data": {"mix": [f"{workdir}/a=1"]}},
        "workdir": epath.Path(workdir),
    }
    return model_card.Card(**{**given, **changes})


@pytest.fixture
def workdir(tmp_path, pipeline):
    """A run's folder: 57 pairs, and an export of step 8."""
    (tmp_path / "encoded").mkdir()
    meta = {"counts": {"train": 57, "validation": 3}, "source": f"table:{tmp_path}/p.jsonl"}
    meta |= {"vae": "org/vae", "model": str(pipeline)}
    (tmp_path / "encoded" / "encoded.json").write_text(json.dumps(meta))
    export = tmp_path / "export"
    write_tiny_pipeline(epath.Path(export), FAMILY)
    record.write_record(epath.Path(export), step=8, ema=False)
    return tmp_path


def rendered(card, step=8, ema=False):
    return model_card.render(card, card.workdir / "export", step=step, ema=ema)


def test_the_card_counts_distinct_pairs_and_keeps_paths_to_itself(workdir, pipeline):
    text = rendered(make_card(pipeline, workdir))
    assert "64 draws from 57 distinct preference pairs" in text
    assert "base_model:" not in text
    for part in ("secret_place", str(workdir), "/"):
        assert part not in text.replace("</", "").replace("org/vae", ""), part
    for kept in ("| source | table:p.jsonl |", "| vae | org/vae |", "| data.mix | a=1 |"):
        assert kept in text
    mixed = make_card(pipeline, workdir, pairs=(f"{workdir}/encoded=0.5", f"{workdir}/encoded=1"))
    assert "from 114 distinct" in rendered(mixed)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("org/name", "org/name"),
        ("org/name@main", "org/name@main"),
        ("/data/models/sd15/", "sd15"),
        ("gs://bucket/run/encoded", "encoded"),
        ("pickapic:gs://bucket/pairs", "pickapic:pairs"),
        ("../here", "here"),
    ],
)
def test_only_hub_ids_are_named_whole(text, shown):
    assert model_card.public(text) == shown


def test_what_a_source_says_of_itself_is_no_markup():
    shown = model_card.table({"source": "a\n## Hacked <img src=x> | b"})
    assert shown.endswith("| source | a ## Hacked &lt;img src=x&gt; \\| b |")
    shown = model_card.table({"a\n## b": "![x](evil)", "c": "`d`"})
    assert shown.endswith("| a ## b | !\\[x\\](evil) |\n| c | \\`d\\` |")


def test_a_fork_says_where_it_comes_from(workdir, pipeline):
    forked = {"workdir": "/secret", "step": 40, "identity": "0"}
    text = rendered(make_card(pipeline, workdir, forked=forked))
    assert "It went on from step 40 of another run." in text


def write_result(workdir, **export):
    found = {"judges": JUDGED, "export": {**record.describe(workdir / "export"), **export}}
    (workdir / "result.json").write_text(json.dumps(found))


def test_win_rates_are_of_the_same_weights(workdir, pipeline):
    card = make_card(pipeline, workdir)
    write_result(workdir)
    assert "| win rate over the base by svm | 0.750 " in rendered(card)
    assert "win rate" not in rendered(card, step=6)  # another checkpoint, converted
    assert "win rate" not in rendered(card, ema=True)
    write_result(workdir, weights="others")
    assert "win rate" not in rendered(card)
    (workdir / "result.json").write_text(json.dumps({"judges": JUDGED}))  # by an older version
    assert "win rate" not in rendered(card)


def test_the_card_is_written_again_with_what_judges_found(workdir, pipeline):
    card, readme = make_card(pipeline, workdir), workdir / "export" / "README.md"
    run.write_cards(card)
    assert "win rate" not in readme.read_text()
    write_result(workdir)
    run.write_cards(card)
    assert "win rate" in readme.read_text()
    assert "after 8 updates" in readme.read_text()


def test_weights_that_changed_since_are_of_no_step(workdir):
    export = workdir / "export"
    assert record.describe(export)["step"] == 8
    save_file({"x": np.zeros(2)}, export / "unet" / "diffusion_pytorch_model.safetensors")
    assert set(record.describe(export)) == {"weights"}


def test_half_a_line_of_metrics_is_left_out(workdir, pipeline):
    (workdir / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5}\n{"step": 8, "lo')
    assert "| loss | 0.5 |" in rendered(make_card(pipeline, workdir))

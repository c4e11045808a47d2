"""The model card: what it counts, what it tells of, and whose win rates it takes."""

import json
import shutil

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from dmpo_jax.export import model_card, record, run
from dmpo_jax.toy.debug import write_tiny_pipeline
from tests.support.tiny import FAMILY

JUDGED = {"overall": {"svm": {"win_rate": 0.75, "win_rate_ci95": [0.7, 0.8]}}}


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
    shutil.copytree(pipeline, export)
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
        ("hf:org/name@main:train", "hf:org/name@main:train"),
        ("hf:/data/org/name:train", "hf:name:train"),
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


def write_result(workdir, base, folder="", **export):
    """result.json of an evaluation of the export. folder: in the workdir. export: changes to it."""
    tuned = {**record.describe(workdir / "export"), **export}
    found = {
        "baseline": base,
        "models": {
            base: {"folder": base, "export": record.describe(base)},
            "tuned": {"folder": "x", "export": tuned},
        },
        "comparisons": {"tuned": JUDGED},
        "scorers": {"svm": {"version": "scikit-learn 1", "independent": False}},
        "prompts": 12,
        "images_per_prompt": 3,
        "estimand": "like_these",
        "protocol": {"name": "sdpo", "steps": 20, "vae": f"{workdir}/vae", "models": {"a": 1}},
    }
    (workdir / folder).mkdir(exist_ok=True)
    (workdir / folder / "result.json").write_text(json.dumps(found))


def test_win_rates_are_of_the_same_weights(workdir, pipeline):
    card = make_card(pipeline, workdir)
    write_result(workdir, base=str(pipeline))
    text = rendered(card)
    assert "| win rate over the base by svm | 0.750 (95 % interval 0.700 to 0.800); " in text
    assert "win rate" not in rendered(card, step=6)  # another checkpoint, converted
    assert "win rate" not in rendered(card, ema=True)
    write_result(workdir, base=str(pipeline), weights="others")
    assert "win rate" not in rendered(card)


def test_an_evaluation_is_told_with_its_protocol(workdir, pipeline):
    card = make_card(pipeline, workdir)
    write_result(workdir, base=str(pipeline), folder="evaluation")  # as evaluate --out=... makes it
    text = rendered(card)
    for row in (
        "it also labelled the training pairs",
        "scorer's version scikit-learn 1",
        "| prompts | 12 |",
        "| images_per_prompt | 3 |",
        "| intervals are for prompts | like these |",
        "| protocol.name | sdpo |",
        "| protocol.steps | 20 |",
        "| protocol.vae | vae |",
    ):
        assert row in text
    assert "protocol.models" not in text
    assert str(workdir) not in text
    write_result(workdir, base=str(workdir / "export"), folder="evaluation")
    assert "win rate over export by svm" not in rendered(card)  # a model against itself
    other = workdir / "other"
    shutil.copytree(pipeline, other)
    save_file({"x": np.zeros(2)}, other / "unet" / "diffusion_pytorch_model.safetensors")
    write_result(workdir, base=str(other), folder="evaluation")
    assert "| win rate over other by svm | 0.750 " in rendered(card)


def test_the_base_is_told_by_its_weights(workdir, pipeline):
    digest = record.describe(pipeline)["weights"]
    assert f"| digest of its weights | {digest} |" in rendered(make_card(pipeline, workdir))


def test_the_card_is_written_again_with_what_judges_found(workdir, pipeline):
    card, readme = make_card(pipeline, workdir), workdir / "export" / "README.md"
    run.write_cards(card)
    assert "win rate" not in readme.read_text()
    write_result(workdir, base=str(pipeline))
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

"""dmpo_jax.jobs.train by its data's config: mixtures, flips, means alone."""

import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
from etils import epath

from dmpo_jax.config import checks as config_checks
from dmpo_jax.config import configs
from dmpo_jax.data.batches.mixture import Mixture
from dmpo_jax.data.encoded import records
from dmpo_jax.jobs import train
from dmpo_jax.toy import debug
from dmpo_jax.training import build, hooks
from tests.support import tiny
from tests.support.encoded import EncodedPair, PromptEmbedding, write_pairs

SIDE, WIDTH, PROMPTS = 8, 16, 3


def write(folder, *, moments="sample", channels=4, flipped=False, value=0.0, **more):
    """Twelve pairs for the model of `tiny`, four of them for validation."""
    shape = (2, SIDE, SIDE, channels * (2 if moments == "sample" else 1))

    def pair(i):
        x, sizes = (
            np.full(shape, value, np.float16),
            np.array([[64, 78, 0, 7, 64, 64]] * 2, np.int32),
        )
        return EncodedPair(str(i), 1 + i % 2, 0.75, x, sizes, flipped=-x if flipped else None)

    prompts = [PromptEmbedding("p" * j, np.full((4, WIDTH), j, np.float16)) for j in range(PROMPTS)]
    meta = {"model": "tiny", "scaling_factor": 1.0, "shift_factor": 0.0, "moments": moments, **more}
    splits = {"train": map(pair, range(8)), "validation": map(pair, range(8, 12))}
    write_pairs(folder, splits, prompts, meta)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("model"))
    debug.write_tiny_pipeline(folder, tiny.FAMILY)
    return str(folder)


def prepare(config, workdir):
    return train.prepare(config, epath.Path(workdir))[0]


@pytest.mark.long
@pytest.mark.parametrize("moments", ["sample", "mean"])
def test_the_kind_of_moments_is_the_folders_word(model, tmp_path, moments):
    run = prepare(tiny.make_config(model, write(tmp_path, moments=moments)), tmp_path)
    assert run.step.setup.mean_only == (moments == "mean")
    assert run.pairs.meta.latent_channels == 4
    validate = hooks.Validate(run.step, run.pairs, run.key, batch_size=8, every=1)
    metrics = validate.measure(run.step.reference)
    assert np.isfinite(metrics["validation_loss"])


def test_moments_that_do_not_fit_the_unet_are_refused(model, tmp_path):
    """Eight channels: 2C of this model if they were a sample's, but they are said to be means."""
    encoded = write(tmp_path / "a", moments="mean", channels=8)
    with pytest.raises(ValueError, match=r"4 .*channels|channels.* 8"):
        prepare(tiny.make_config(model, encoded), tmp_path)
    marker = tmp_path / "a" / records.MARKER
    meta = json.loads(marker.read_text())
    marker.write_text(json.dumps({**meta, "moments": "median"}))
    with pytest.raises(ValueError, match='should be "sample" or "mean", but are'):
        prepare(tiny.make_config(model, encoded), tmp_path)


@pytest.mark.long
def test_a_mixture_trains_and_validates_on_every_folder(model, tmp_path):
    folders = [write(tmp_path / name, value=v) for name, v in (("a", 1.0), ("b=c", 2.0))]
    mix = (f"{folders[0]}=1", f"{folders[1]}=3.0")
    run = prepare(tiny.make_config(model, "", data__mix=mix), tmp_path)
    assert isinstance(run.pairs, Mixture)
    batches = run.batches()
    values = np.concatenate([next(batches).moments[:, 0, 0, 0, 0] for _ in range(128)])
    assert (values == 1).mean() == pytest.approx(0.25, abs=0.01)
    assert run.pairs.meta.counts["validation"] == 8


def test_flips_are_drawn_where_asked_for(model, tmp_path):
    encoded = write(tmp_path / "a", flipped=True, value=1.0)
    signs = []
    for flip in (False, True):
        run = prepare(tiny.make_config(model, encoded, data__flip=flip), tmp_path)
        batches = run.batches()
        signs.append({float(x) for _ in range(4) for x in next(batches).moments.ravel()})
    assert signs == [{1.0}, {1.0, -1.0}]
    plain = tiny.make_config(model, write(tmp_path / "b"), data__flip=True)
    with pytest.raises(ValueError, match="encode with flips"):
        prepare(plain, tmp_path).batches()


@pytest.mark.long
def test_ties_that_were_to_be_dropped_are_refused(model, tmp_path):
    kept = write(tmp_path / "kept", ties="keep", tied_pairs=3)
    refused = tiny.make_config(model, kept, data__ties="drop")
    match = "data.ties=drop, and .*kept holds 3 pairs that nobody prefers: encode with --ties=drop"
    for check in (train.check, prepare):  # before the jobs ahead of it, and by itself
        with pytest.raises(ValueError, match=match):
            check(refused, epath.Path(tmp_path / "run"))
    mix = (f"{write(tmp_path / 'none', ties='keep', tied_pairs=0)}=1", f"{kept}=1")
    with pytest.raises(ValueError, match=match):
        prepare(tiny.make_config(model, "", data__mix=mix, data__ties="drop"), tmp_path)
    dropped = write(tmp_path / "dropped", ties="drop", tied_pairs=0)
    for encoded, ties in ((kept, "keep"), (dropped, "drop"), (dropped, "keep")):
        prepare(tiny.make_config(model, encoded, data__ties=ties), tmp_path)


def test_only_a_model_that_is_told_sizes_is_told_others(model, tmp_path):
    config = tiny.make_config(model, write(tmp_path / "a"), data__sizes="resolution")
    with pytest.raises(ValueError, match=r"data.sizes=resolution .* told nothing of them: unset"):
        prepare(config, tmp_path)


def test_training_and_validation_tell_the_model_the_same_sizes(model, tmp_path):
    run = prepare(tiny.make_config(model, write(tmp_path / "a", told_sizes=True)), tmp_path)
    settings = dataclasses.replace(run.step.settings, sizes="resolution")
    told = []

    def validate(params, reference, batch, weights, *rest):
        told.append(batch.condition.sizes)
        return {"weight": weights.sum()}

    for step, crop in ((run.step, 7), (run.step._replace(settings=settings), 0)):
        told.append(next(build.make_batches(step, run.pairs, seed=0)).condition.sizes)
        with mock.patch.object(build.TrainingStep, "make_validate", return_value=validate):
            hooks.Validate(step, run.pairs, run.key, batch_size=8, every=1).measure({})
        assert [sorted(set(np.asarray(x)[..., 3].ravel())) for x in told] == [[crop]] * 2
        told.clear()


@pytest.mark.parametrize(
    ("leaves", "match"),
    [
        ({"data__mix": ("a=1", "b")}, "FOLDER=WEIGHT, weights above 0, but got 'b'"),
        ({"data__mix": ("=1",)}, "FOLDER=WEIGHT.* got '=1'"),
        ({"data__mix": ("a=0",)}, "FOLDER=WEIGHT.* got 'a=0'"),
        ({"data__mix": ("a=nan",)}, "FOLDER=WEIGHT.* got 'a=nan'"),
        ({"data__mix": ("a=1",), "data__encoded": "b"}, "takes the place of data.encoded"),
        ({"data__mix": ("a=1",), "jobs": ("encode", "train")}, "drop it from jobs, or data.mix"),
    ],
)
def test_refuses_wrong_mixtures(leaves, match):
    config = tiny.make_config("model", "", **leaves)
    with pytest.raises(ValueError, match=match):
        config_checks.validate(config)


def test_identity_knows_mixtures_and_flips_and_stays_where_there_are_none():
    base = configs.identity(tiny.make_config("model", ""))
    assert not {"mix", "flip", "flip_each", "sizes"} & set(base["data"])
    given = {"data__mix": ("a=1", "b=2"), "data__flip": True, "data__flip_each": True}
    for leaf, value in {**given, "data__sizes": "resolution"}.items():
        found = configs.identity(tiny.make_config("model", "", **{leaf: value}))
        assert found != base
        assert json.loads(json.dumps(found)) == found
    assert config_checks.parse_mix(("gs://x/a=b=2", "c=0.5")) == [("gs://x/a=b", 2.0), ("c", 0.5)]

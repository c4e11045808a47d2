"""Forks: what goes along from another run, what does not, and what is refused."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from dmpo_jax.families import SD
from dmpo_jax.jobs.run import run
from dmpo_jax.models import parameters
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.parallel import meshes
from dmpo_jax.training import build, fork
from dmpo_jax.training.checkpoint import Checkpoints
from dmpo_jax.training.loop import start_state
from dmpo_jax.training.step import Moving
from tests.support import tiny
from tests.support.steps import META, SCHEDULE, UNET, settings

# Orbax leaves coroutines to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ADAMW = {"name": "adamw", "clip_norm": 1.0}
IDENTITY = {"model": {"folder": "base"}, "optimizer": {"learning_rate": 1e-3}}


def make_step(**changes):
    """(step, parameters) of a tiny model."""
    model = parameters.initialise(UNet2DConditionModel, UNET, 0)
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    return build.build(SD, model, SCHEDULE, META, mesh, settings(**{"optimizer": ADAMW, **changes}))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A workdir with a checkpoint of step 7: every number of its state has a value of its own."""
    workdir = epath.Path(tmp_path_factory.mktemp("source"))
    built, params = make_step(ema_decay=0.9, moving=Moving(0.9))
    leaves, structure = jax.tree.flatten(built.make_state(params))
    own = [jax.device_put(np.asarray(x) + i + 1, x.sharding) for i, x in enumerate(leaves)]
    state = jax.tree.unflatten(structure, own)
    with Checkpoints(workdir / "checkpoints", keep=1, identity=IDENTITY) as checkpoints:
        checkpoints.save(7, state)
    return workdir, jax.device_get(state)


def forked(source, new, *, theirs=ADAMW, kept=True, **changes):
    """The first state of a fork, as training begins with it."""
    built, params = make_step(**changes)
    new = epath.Path(new)
    with Checkpoints(new / "checkpoints", keep=1, identity={**IDENTITY, "seed": 1}) as checkpoints:
        about = {"optimizer": theirs, "ema": kept, "moving": kept}
        fork.fork(built, params, source[0], new, checkpoints, **about)
        return jax.device_get(start_state(built, params, checkpoints))


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.long
def test_weights_and_moments_go_along_and_the_step_is_0(source, tmp_path):
    state = forked(source, tmp_path, ema_decay=0.5, moving=Moving(0.5))
    assert (int(state.step), int(state.skipped)) == (0, 0)
    for part in ("params", "ema", "moving", "opt_state"):
        assert_equal(getattr(state, part), getattr(source[1], part))
    made = json.loads((tmp_path / fork.FORK).read_text())
    assert (made["step"], made["workdir"]) == (7, str(source[0]))
    assert len(made["identity"]) == 64


@pytest.mark.long
def test_moments_go_along_to_another_clipping_and_not_to_another_optimizer(source, tmp_path):
    free = {**ADAMW, "clip_norm": 0.0}
    state = forked(source, tmp_path / "a", optimizer=free)
    assert_equal(jax.tree.leaves(state.opt_state), jax.tree.leaves(source[1].opt_state))
    assert state.ema is state.moving is None
    changes = {"optimizer": {"name": "adafactor"}, "ema_decay": 0.5, "moving": Moving(0.5)}
    state = forked(source, tmp_path / "b", kept=False, **changes)
    assert_equal(state.params, source[1].params)
    assert_equal(state.ema, state.params)  # an average begins with the weights
    assert_equal(state.moving, state.params)
    assert max(float(abs(x).max()) for x in jax.tree.leaves(state.opt_state)) < 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"folder": "other"}}, "model.folder: 'base' there, 'other' now"),
        ({"lora": {"rank": 4}}, r"lora.rank: '\(not set\)' there, 4 now"),
    ],
)
def test_another_model_is_refused_in_words(source, tmp_path, change, words):
    with pytest.raises(ValueError, match=f"a fork keeps the model of its run.*\n.*{words}"):
        fork.check(source[0], epath.Path(tmp_path), {**IDENTITY, **change})
    other = {**IDENTITY, "optimizer": {"learning_rate": 1e-5}, "objective": "sft", "data": {"x": 1}}
    other["model"] = {"folder": "base", "compute_dtype": "float32"}
    assert fork.check(source[0], epath.Path(tmp_path), other)


def test_where_a_fork_can_and_cannot_go(source, tmp_path):
    workdir, new = source[0], epath.Path(tmp_path)
    with pytest.raises(ValueError, match="another folder than --workdir"):
        fork.check(workdir, workdir, IDENTITY)
    with pytest.raises(ValueError, match="has no checkpoint to fork from"):
        fork.check(new / "empty", new, IDENTITY)
    with pytest.raises(ValueError, match="holds a run that is not a fork of"):
        fork.check(new / "empty", workdir, IDENTITY)
    (new / fork.FORK).write_text(json.dumps({"workdir": str(workdir)}))
    with pytest.raises(ValueError, match=f"not finished: run again with --workdir={workdir}"):
        fork.check(None, new, IDENTITY)
    assert fork.check(workdir, new, IDENTITY)
    (new / "checkpoints" / "0").mkdir(parents=True)
    assert not fork.check(workdir, new, IDENTITY)  # it is one already, and resumes
    assert not fork.check(None, new, IDENTITY)


@pytest.mark.slow
def test_a_fork_resumed_equals_a_fork_uninterrupted(tmp_path):
    made = tiny.write(tmp_path / "tiny")
    old = tmp_path / "old"
    run(tiny.make_config(*made, train__steps=4), old)
    other = {"optimizer__learning_rate": 3e-3, "objective": "diffusion_dpo"}
    weights = {}
    for name, parts in (("whole", (4,)), ("parts", (2, 4))):
        for steps in parts:
            run(tiny.make_config(*made, train__steps=steps, **other), old, fork=tmp_path / name)
        weights[name] = (tmp_path / name / "export" / "unet").glob("*.safetensors")
    whole, parts = (b"".join(f.read_bytes() for f in sorted(x)) for x in weights.values())
    assert whole == parts
    rows = [json.loads(r) for r in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert rows[0]["margin_abs_max"] > 0  # the reference is the base, not the fork's beginning
    assert "another run" in (tmp_path / "parts" / "export" / "README.md").read_text()

"""Tests of benchmarks/study/compare.py: its searches, labels, intervals, resuming, and its runs."""

import dataclasses
import json
import math

import numpy as np
import pytest
from etils import epath

from benchmarks.study import bench, plots, tables, trials
from benchmarks.study.results import Results, interval
from benchmarks.study.trials import SPACES, TASKS, Budget, Job, Trial, chosen, finals, missing
from benchmarks.study.workers import results as run_job
from dmpo_jax.jobs import train
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.toy import digits
from dmpo_jax.types import Condition, PairBatch
from tests.support import tiny

JUDGES = ("digits_svm", "digits_forest")
TASK = "digits_dmpo"


class FakeBench:
    """Scores settings without training: best at `peak`; records the trials it was asked for."""

    def __init__(self, peak=None, noise=0.0):
        self.asked, self.noise = [], noise
        self.peak = {"beta": 100.0, "alpha": 0.03, "b": 0.03, "rate": 1e-4} | (peak or {})

    def base(self, task):
        return {"scores": dict.fromkeys(JUDGES, 0.5), "diversity": 0.3}

    def run(self, trial):
        self.asked.append(trial.name)
        own = dict(trial.setting)
        far = sum(abs(math.log10(own[name] / at)) for name, at in self.peak.items() if name in own)
        rng = np.random.default_rng(len(self.asked))
        level = 0.9 - far / 10 - trial.flipped / 2 + 0.01 * trial.seed % 0.05
        level += self.noise * rng.normal()
        judged = {
            "scores": dict.fromkeys(JUDGES, level),
            "wins": dict.fromkeys(JUDGES, 0.7),
            "diversity": 0.2,
        }
        measured = dict.fromkeys(bench.HEALTH, 0.01)
        path = [{"at": a, **judged, "health": {**measured, "distance": a / 10}} for a in (0.2, 1)]
        about = {"last": {}, "skipped": 0, "alarms": {"clipped": 3}, "path": path, "seconds": 1.0}
        return {**judged, "health": {**measured, "distance": 0.2}, **about}


def do(job, runs, fake):
    for name, result in run_job(fake, job, runs, JUDGES[0]):
        runs[name] = result


def test_t_intervals_are_those_of_the_tables():
    # Student's t at 0.975 with 4 degrees of freedom: 2.776.
    x = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    np.testing.assert_allclose(x, (3, 3 - half, 3 + half), rtol=1e-6)
    assert not x.apart(4.9)
    assert x.apart(5.0)
    assert np.isnan(interval([1.0]).low)


@pytest.mark.parametrize("objective", ["dmpo", "diffusion_dpo", "nft", "sft"])
def test_a_search_ends_at_a_peak_that_it_has_passed_on_every_side(objective):
    runs, fake = {}, FakeBench()
    do(Job(TASK, objective), runs, fake)
    setting = dict(chosen(TASK, objective, runs, JUDGES[0]))
    for name, ladder in SPACES[objective].axes(TASKS[TASK]).items():
        if name in fake.peak:
            nearest = min(ladder, key=lambda x, name=name: abs(math.log(x / fake.peak[name])))
            assert setting[name] == nearest
    assert trials.at_an_edge(TASK, objective, tuple(setting.items()), runs) == []
    assert len(trials.searched(TASK, objective, runs)) <= trials.most(TASK, objective)
    assert missing(Job(TASK, objective), runs, JUDGES[0]) == []


def test_a_search_that_finds_no_end_says_at_which_edge_it_stopped():
    runs = {}
    do(Job(TASK, "hinge"), runs, FakeBench({"beta": 1e9}))
    setting = chosen(TASK, "hinge", runs, JUDGES[0])
    assert len(trials.searched(TASK, "hinge", runs)) == trials.most(TASK, "hinge")
    assert trials.at_an_edge(TASK, "hinge", setting, runs)


def test_noise_does_not_make_a_search_go_on_for_ever():
    for seed in range(5):
        runs = {}
        fake = FakeBench(noise=0.05)
        fake.asked = ["-"] * seed * 100
        do(Job(TASK, "dmpo"), runs, fake)
        assert len(trials.searched(TASK, "dmpo", runs)) <= trials.most(TASK, "dmpo")
        assert len(runs) <= 1 + trials.most(TASK, "dmpo") + 2 * trials.FINALISTS + trials.SEEDS + 2


def test_every_point_of_every_space_is_legal_and_has_a_branch():
    for name, space in SPACES.items():
        assert set(space.first) == set(space.ladders)
        for task in TASKS:
            points = trials._points(task, name).values()
            # The rate is no hyperparameter: one point of each of the others.
            for trial in {str(point.hyperparameters): point for point in points}.values():
                OBJECTIVES[name].check(**trial.hyperparameters)
                assert bench.branch_of(trial) in bench.BRANCHES


def test_a_second_call_runs_what_is_lost_alone(tmp_path):
    results = Results(tmp_path / "compare.json", Budget())
    do(Job(TASK, "dmpo"), results.runs, FakeBench())
    results.save()
    again = Results(results.path, Budget())
    assert again.runs == json.loads(json.dumps(results.runs))
    lost = [name for name in again.runs if name.endswith("seed=3")]
    del again.runs[lost[0]]
    fake = FakeBench()
    do(Job(TASK, "dmpo"), again.runs, fake)
    assert fake.asked == lost
    with pytest.raises(ValueError, match=r"batch_size 16, not 8.*--out"):
        Results(results.path, dataclasses.replace(Budget(), batch_size=8))


def test_variants_wait_for_the_setting_that_they_vary():
    job, runs = Job(TASK, "dmpo", "labels"), {}
    assert missing(job, runs, JUDGES[0]) is None
    do(Job(TASK, "dmpo"), runs, FakeBench())
    wanted = missing(job, runs, JUDGES[0])
    assert len(wanted) == len(trials.LABELS) * trials.SEEDS
    assert {trial.setting for trial in wanted} == {chosen(TASK, "dmpo", runs, JUDGES[0])}
    assert len({trial.name for trial in wanted}) == len(wanted)


def trial(**changes):
    setting = (("beta", 30.0), ("alpha", 0.01), ("rate", 1e-3))
    return Trial(TASK, "dmpo", setting, **{"seed": 0, **changes})


def test_labels_are_drawn_by_the_seed_with_the_probability():
    probability = np.full(20000, 0.8)
    swap, preference = bench.draw_labels(probability, trial())
    assert (preference == 1).all()
    assert swap.mean() == pytest.approx(0.2, abs=0.01)
    other = bench.draw_labels(probability, trial(seed=1))[0]
    assert (other != swap).mean() == pytest.approx(2 * 0.8 * 0.2, abs=0.01)
    np.testing.assert_array_equal(swap, bench.draw_labels(probability, trial())[0])
    # Flips turn drawn labels round: 0.8 is seen as 0.7 * 0.8 + 0.3 * 0.2.
    flipped = bench.draw_labels(probability, trial(flipped=0.3))[0]
    assert (flipped != swap).sum() == 6000
    assert 1 - flipped.mean() == pytest.approx(0.62, abs=0.01)
    swap, votes = bench.draw_labels(probability, trial(labels="votes5"))
    assert {round(float(x), 3) for x in votes} == {0.6, 0.8, 1.0}
    first = np.where(swap, 1 - votes, votes)
    assert first.mean() == pytest.approx(0.8, abs=0.01)
    swap, given = bench.draw_labels(np.array([0.3, 0.9]), trial(labels="probability"))
    np.testing.assert_allclose(given, [0.7, 0.9], rtol=1e-6)
    np.testing.assert_array_equal(swap, [True, False])


def test_the_preferred_image_comes_first_with_all_that_belongs_to_it():
    moments = np.arange(2 * 2 * 4.0).reshape(2, 2, 1, 1, 4)
    sizes = np.arange(2 * 2 * 6).reshape(2, 2, 6)
    pairs = PairBatch(moments, np.ones(2), Condition(np.zeros((2, 3, 1)), sizes=sizes))
    turned = bench.relabelled(pairs, np.array([True, False]), np.array([0.6, 1.0]))
    np.testing.assert_array_equal(turned.moments, np.stack([moments[0, ::-1], moments[1]]))
    np.testing.assert_array_equal(turned.condition.sizes, np.stack([sizes[0, ::-1], sizes[1]]))
    np.testing.assert_array_equal(turned.preference, [0.6, 1.0])


def test_every_epoch_holds_each_pair_once():
    pairs = PairBatch(np.arange(10.0)[:, None], np.ones(10), Condition(np.zeros((10, 1, 1))))
    data = bench.batches(pairs, 4, seed=0)
    seen = np.concatenate([next(data).moments[:, 0] for _ in range(5)])
    assert sorted(seen[:8]) != list(range(8))
    assert sorted(seen) == sorted([*range(10)] * 2)


def test_diversity_is_the_distance_within_a_caption():
    black, white = (np.full((1, 4, 4, 3), value, np.uint8) for value in (0, 255))
    images = np.concatenate([black, white, black, black])
    assert bench.diversity(images, ["a", "a", "b", "b"]) == pytest.approx(0.5)
    assert np.isnan(bench.diversity(images[:1], ["a"]))


def test_a_score_at_a_distance_is_read_off_the_path():
    base = {"scores": {"j": 0.5}}
    path = [{"health": {"distance": 0.04}, "scores": {"j": 0.7}}]
    run = {"health": {"distance": 0.16}, "scores": {"j": 0.8}, "path": path}
    assert tables.at_distance(run, base, "j", 0.01) == pytest.approx(0.6)
    assert tables.at_distance(run, base, "j", 0.09) == pytest.approx(0.75)
    assert math.isnan(tables.at_distance(run, base, "j", 0.2))


def test_tables_and_plots_say_what_was_measured(tmp_path):
    results = Results(tmp_path / "compare.json", Budget())
    jobs = [
        Job(TASK, name, stage) for name in trials.RELABELLED for stage in ("objective", "betas")
    ]
    for job in (*jobs, Job(TASK, "dmpo", "labels")):
        do(job, results.runs, FakeBench({"beta": 30.0, "alpha": 0.01}))
    text = tables.report(results, JUDGES[0])
    assert "`dmpo` | 0.920 [0.900, 0.940]" in text
    assert "| beta=30 alpha=0.01 rate=0.0001 |" in text
    assert "clipped 5" in text
    assert "flipped=0.2 |" in text
    assert "**-0.100 [-0.100, -0.100]**" in text
    assert "| 300 | `dmpo` | 0.820 [0.800, 0.840] |" in text
    # 0.1 lies halfway in the root of the distance from 0.02 (0.2 / 10) to 0.1 (1 / 10).
    assert "at a distance of 0.1 from the base" in text
    plots.plot(tmp_path, results, JUDGES[0])
    for name in ("compare", "compare_frontier", "compare_betas", "compare_variants"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def tiny_task(tmp_path_factory):
    """A tiny model in place of the task's."""
    folder = tmp_path_factory.mktemp("tiny")
    model, encoded = tiny.write(folder)
    budget = Budget(steps={TASK: 4}, batch_size=8, tuning_images=20, path_images=20, images=20)

    def config(task, budget):
        sampling = {"sample__steps": 2, "sample__guidance_scale": 1.0}
        sampling["sample__prompts"] = str(digits.PIPELINE / "prompts.txt")
        return tiny.make_config(
            model,
            encoded,
            evaluate__judges=JUDGES,
            train__steps=budget.steps[task.name],
            train__batch_size=budget.batch_size,
            optimizer__schedule="cosine",
            optimizer__warmup_steps=1,
            **sampling,
        )

    work = epath.Path(folder)
    (work / TASK).mkdir()
    (epath.Path(encoded)).rename(work / TASK / "encoded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "base_config", config)
        yield bench.Bench(budget, work), config, work


@pytest.mark.slow
def test_the_shared_update_is_the_one_that_a_config_asks_for(tiny_task):
    """Objective, beta, rate and anchor as arguments give what they give as constants."""
    made, config, work = tiny_task
    ready = made._open(TASK)
    for asked in (
        trial(),
        dataclasses.replace(trial(), objective="ipo", setting=(("beta", 5.0), ("rate", 1e-3))),
        trial(anchor=("hinge", 0.1)),
        trial(moving=(0.5, 2)),
    ):
        *_, (_, params, measured) = made._train(asked, ready)
        own = config(TASKS[TASK], made._budget)
        own.objective = asked.objective
        for name, value in asked.hyperparameters.items():
            own.objectives[asked.objective][name] = value
        own.optimizer.learning_rate = asked.rate
        if asked.anchor:
            own.anchor.kind, own.anchor.weight = "hinge", 0.1 * 30
        if asked.moving:
            own.reference.decay, own.reference.every = asked.moving
        own.data.encoded = str(work / TASK / "encoded")
        run, first = train.prepare(own, work)
        before = {path: np.array(x) for path, x in first.items()}
        state = run.step.make_state(first)
        update = run.step.make_update(state)
        pairs = bench.relabelled(ready.pairs, *bench.draw_labels(ready.probability, asked))
        data = bench.batches(pairs, 8, asked.seed)
        for _ in range(4):
            state, _ = update(state, run.step.reference, next(data), run.key)
        # Adam turns the rounding of a gradient near 0 into a step: of all steps, how far apart.
        apart = moved = 0.0
        for path, x in state.params.items():
            apart += float(np.square(np.asarray(x) - np.asarray(params[path])).sum())
            moved += float(np.square(np.asarray(x) - np.asarray(before[path])).sum())
        assert apart < 1e-4 * moved, (asked, apart, moved)
        assert measured["skipped"] == 0


@pytest.mark.slow
def test_a_run_is_the_same_again_and_its_variants_are_not(tiny_task):
    made, *_ = tiny_task
    first, again = made.run(trial()), made.run(trial())
    other = [made.run(trial(seed=1)), made.run(trial(mu=0.9)), made.run(trial(flipped=0.3))]
    for name in ("scores", "wins", "health", "last", "path", "diversity"):
        assert first[name] == again[name]
    for run in other:
        assert run["health"]["distance"] != first["health"]["distance"]
    assert [point["at"] for point in first["path"]] == [0.5]
    assert "path" not in other[1]
    quiet = made.run(dataclasses.replace(trial(), tuning=True))
    assert "path" not in quiet
    json.dumps([first, *other, quiet])


def test_finals_have_seeds_that_no_search_saw():
    seeds = {t.seed for t in finals(TASK, "dmpo", trial().setting)}
    assert len(seeds) == trials.SEEDS
    assert not seeds & {trials.SEARCH_SEED, trials.SECOND_SEED}

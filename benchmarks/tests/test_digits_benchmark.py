"""Tests of benchmarks/study/digits.py: its intervals, its grids, its resuming, its label flips."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from benchmarks.study import digits_noise, digits_plan, digits_plots, digits_report, digits_runs
from benchmarks.study.digits_plan import (
    Setting,
    Trial,
    chosen,
    final_trials,
    groups,
    rows_of,
    second_round,
    tuning_trials,
)
from benchmarks.study.digits_scores import Results, interval, make_rows, wins
from benchmarks.study.digits_workers import Workers
from dmpo_jax.data.encoded import records
from dmpo_jax.evaluation.statistics import compare
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.toy import digits
from dmpo_jax.training import optim, step
from tests.support import tiny
from tests.support.encoded import EncodedPair, PromptEmbedding, write_pairs

JUDGES = ("digits_svm", "digits_forest")
ABOUT = {"steps": 1, "batch_size": 2, "pairs": 40, "tuning_images": 6, "images": 6}


def test_identical_scores_win_half_for_certain():
    scores = np.random.default_rng(0).random((3, 40))
    assert interval(wins(scores, scores)) == (0.5, 0.5, 0.5)


def test_a_shift_is_found_whole():
    rng = np.random.default_rng(0)
    scores = rng.random((3, 200))
    assert interval(wins(scores + 0.1, scores)) == (1.0, 1.0, 1.0)
    # Paired: the scores differ from image to image, the difference does not.
    mean, low, high = interval(scores + 0.1 - scores)
    np.testing.assert_allclose([mean, low, high], 0.1, rtol=1e-9)
    unpaired = interval(scores)
    assert unpaired.high - unpaired.low > 0.03


def test_of_one_run_the_interval_is_that_of_the_evaluate_job():
    rng = np.random.default_rng(1)
    base = rng.random(300)
    policy = base + rng.normal(0.05, 0.2, 300)
    theirs = compare(base, policy, np.arange(300), estimand="like_these")
    ours = interval(wins(policy, base)[None])
    assert ours.mean == pytest.approx(theirs["win_rate"])
    np.testing.assert_allclose(ours[1:], theirs["win_rate_ci95"], atol=0.01)


def test_training_runs_that_differ_widen_the_interval():
    images = np.random.default_rng(2).random((1, 400))
    alike, apart = images + np.zeros((3, 1)), images + np.array([[-0.2], [0.0], [0.2]])
    assert interval(alike).mean == pytest.approx(interval(apart).mean)
    assert interval(apart).high - interval(apart).low > 3 * (
        interval(alike).high - interval(alike).low
    )


def test_every_objective_is_tuned_with_the_same_effort():
    sizes = {name: len(grid.settings()) for name, grid in digits_plan.GRIDS.items()}
    assert set(sizes.values()) == {9}
    assert all(len({str(s) for s in grid.settings()}) == 9 for grid in digits_plan.GRIDS.values())
    for name, grid in digits_plan.GRIDS.items():
        for setting in grid.settings():
            OBJECTIVES[name].check(**setting.hyperparameters)


def test_runs_of_one_program_stay_together_and_done_ones_are_left_out():
    trials = tuning_trials("dmpo")
    assert [len(group) for group in groups(trials, [])] == [3, 3, 3]
    left = groups(trials, [trial.name for trial in trials[:3]])
    assert [trial for group in left for trial in group] == trials[3:]
    seeds = final_trials("dmpo", trials[0].setting, 3, flipped=0.1)
    assert len({trial.name for trial in seeds} | {trial.name for trial in trials}) == 12
    assert groups(seeds, []) == [seeds]


class FakeBench:
    """Scores without training; records the trials it was asked for."""

    def __init__(self):
        self.asked = []

    def judge_base(self):
        tuning = {"scores": dict.fromkeys(JUDGES, 0.5), "diversity": 0.2}
        held_out = {"scores": {judge: [0.5] * 6 for judge in JUDGES}, "diversity": 0.2}
        return {"tuning": tuning, "held_out": held_out}

    def run(self, trial):
        self.asked.append(trial.name)
        better = 0.1 if trial.objective == "dmpo" else 0.0
        level = 0.6 + better - trial.flipped + 0.01 * trial.seed % 0.05
        level -= abs(np.log10(trial.setting.rate) + 4) / 10  # best at 1e-4
        rng = np.random.default_rng(trial.seed)
        scores = {judge: list(level + 0.1 * rng.random(6)) for judge in JUDGES}
        if trial.tuning:
            scores = {judge: float(np.mean(values)) for judge, values in scores.items()}
        health = dict.fromkeys(digits_runs.HEALTH, 0.01)
        measured = {"diversity": 0.2, "skipped": 0, "seconds_training": 1.0}
        return {"scores": scores, "health": health, **measured}


def compared(path, bench, objectives=("dmpo", "diffusion_dpo"), seeds=2):
    """Runs a complete comparison by a bench, as digits.py does."""
    from benchmarks.study.digits import run_all

    results = Results(path, {**ABOUT, "judges": list(JUDGES)})
    results.notes = {"environment": "a CPU", "workers": "one process"}
    workers = Workers(1, digits_plan.Budget(), path.parent)
    workers._bench = bench
    grids = [trial for name in objectives for trial in tuning_trials(name)]
    run_all(workers, results, grids, "grids", with_base=True)
    for objective in objectives:
        again = second_round(objective, results.runs, JUDGES[0])
        run_all(workers, results, again, "second round")
        setting = chosen(objective, results.runs, JUDGES[0])
        for trials in rows_of(objective, setting, seeds):
            run_all(workers, results, trials, "final runs")
    return results


def test_a_second_call_trains_nothing_and_says_the_same(tmp_path):
    path = tmp_path / "digits.json"
    first, second = FakeBench(), FakeBench()
    results = compared(path, first)
    assert len(first.asked) == 2 * (9 + 4 + 2) + 2 * 3  # three variants
    # As after a kill: the last run is missing, and a partial file lies beside it.
    held = json.loads(path.read_text())
    lost = list(held["runs"])[-1]
    del held["runs"][lost]
    path.write_text(json.dumps(held))
    path.with_name("digits.json.part").write_text("{")
    again = compared(path, second)
    assert second.asked == [lost]
    assert again.runs == results.runs
    assert not list(tmp_path.glob("*.part"))


def test_runs_of_another_budget_are_refused(tmp_path):
    path = tmp_path / "digits.json"
    Results(path, {**ABOUT, "steps": 3}).save()
    with pytest.raises(ValueError, match=r"steps 3 where 1 was asked.*--out"):
        Results(path, ABOUT)


def test_the_setting_is_chosen_by_the_judge_that_labelled():
    trials = tuning_trials("dmpo")
    scores = [
        {"scores": {"digits_svm": i, "digits_forest": -i}} for i in (0, 3, 5, 5, 1, 2, 2, 2, 2)
    ]
    runs = {trial.name: one for trial, one in zip(trials, scores, strict=True)}
    assert chosen("dmpo", runs, "digits_svm") is None  # without the second round
    again = second_round("dmpo", runs, "digits_svm")
    assert [trial.setting for trial in again] == [trials[2].setting] * 2 + [trials[3].setting] * 2
    assert {trial.seed for trial in again} == set(digits_plan.TUNING_SEEDS[1:])
    for trial, score in zip(again, (1, 1, 4, 5), strict=True):
        runs[trial.name] = {"scores": {"digits_svm": score}}
    assert chosen("dmpo", runs, "digits_svm") == trials[3].setting
    assert second_round("dmpo", runs, "digits_forest")[0].setting == trials[0].setting
    del runs[trials[0].name]
    assert second_round("dmpo", runs, "digits_svm") is None


def test_tables_and_plots_say_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    clean = compared(tmp_path / "digits.json", FakeBench())
    rows = make_rows(clean, ["dmpo", "diffusion_dpo", "sft"], 2, JUDGES[0])
    assert len(rows) == 5  # sft is not done
    names = {row.name for row in rows[:3]}  # best first
    assert names == {"dmpo", "dmpo + safeguard", "dmpo + probabilities"}
    assert [row.name for row in rows[3:]] == ["diffusion_dpo", "diffusion_dpo + probabilities"]
    assert rows[0].setting.rate == 1e-4
    assert rows[0].against_baseline["digits_svm"].mean == 1.0
    text = digits_report.report(clean, rows, JUDGES, "python benchmarks/study/digits.py")
    assert "100.0 % [100.0, 100.0]" in text
    assert "beta=30 alpha=0.01 rate=0.0001" in text
    digits_plots.plot(tmp_path / "digits.png", clean, rows, JUDGES)

    trials = digits_noise.noise_trials(clean, ["dmpo"], 2, JUDGES[0])
    noisy = Results(tmp_path / "digits_noise.json", clean.about)
    noisy.notes, noisy.base = clean.notes, clean.base
    for share, each in trials["dmpo"].items():
        for trial in each if share else []:
            noisy.add(trial.name, FakeBench().run(trial))
    (curve,) = digits_noise.make_curves(clean, noisy, trials, list(JUDGES))
    np.testing.assert_allclose(curve.change["digits_svm"], -0.3, rtol=1e-9)
    assert "-0.300 [-0.300, -0.300]" in digits_report.noise_report(noisy, [curve], JUDGES, "it")
    digits_plots.plot_noise(tmp_path / "digits_noise.png", noisy, [curve], JUDGES)
    with pytest.raises(ValueError, match=r"lacks runs of sft.*without --noise"):
        digits_noise.noise_trials(clean, ["sft"], 2, JUDGES[0])


def test_rows_to_flip_are_the_share_of_the_decided_and_no_tie():
    preference = np.where(np.arange(1000) % 10 == 0, 0.5, 1.0)  # 900 decided
    some = digits_runs.flipped_rows(preference, 0.1, seed=3)
    more = digits_runs.flipped_rows(preference, 0.3, seed=3)
    assert len(set(some)) == 90
    assert len(set(more)) == 270
    assert set(some) < set(more)
    assert (preference[more] == 1).all()
    np.testing.assert_array_equal(some, digits_runs.flipped_rows(preference, 0.1, seed=3))
    assert set(some) != set(digits_runs.flipped_rows(preference, 0.1, seed=4))


def test_flipped_pairs_have_their_images_exchanged_in_training_alone(tmp_path):
    rng = np.random.default_rng(0)
    prompts = [PromptEmbedding(t, np.ones((2, 4), np.float32)) for t in ("", "a")]

    def pair(i):
        moments = rng.normal(size=(2, 2, 2, 4)).astype(np.float32)
        label = 0.5 if i % 4 == 0 else 1.0
        return EncodedPair(str(i), 1, label, moments, np.zeros((2, 6), np.int32))

    splits = {"train": [pair(i) for i in range(16)], "validation": [pair(i) for i in range(4)]}
    meta = {"model": "m", "scaling_factor": 1.0, "shift_factor": 0.0}
    write_pairs(tmp_path / "encoded", splits, prompts, meta)
    for _ in range(2):  # the second call finds it there
        digits_runs.flip_labels(epath.Path(tmp_path), 0.25, seed=1)
    flipped = records.open_pairs(tmp_path / "flipped" / "0.25_seed1")
    exchanged = []
    for split, given in splits.items():
        for i, before in enumerate(given):
            after = flipped.split(split)[i]
            assert (after.id, after.preference) == (before.id, before.preference)
            if (after.moments == before.moments).all():
                continue
            np.testing.assert_array_equal(after.moments, before.moments[::-1])
            exchanged.append((split, before.preference))
    assert exchanged == [("train", 1.0)] * 3


def test_diversity_is_the_distance_within_a_caption():
    black, white = (np.full((1, 4, 4, 3), value, np.uint8) for value in (0, 255))
    images = np.concatenate([black, white, black, black])
    assert digits_runs.diversity(images, ["a", "a", "b", "b"]) == pytest.approx(0.5)
    assert np.isnan(digits_runs.diversity(images[:1], ["a"]))


def test_one_program_serves_every_rate():
    """A rate in the state equals a constant one, with schedule and weight decay."""
    params = {"a": jax.numpy.arange(6.0).reshape(2, 3)}
    gradient = {"a": jax.numpy.ones((2, 3))}
    devices = digits_runs.meshes.make_mesh()

    def make(peak):
        schedule = {"warmup_steps": 2, "total_steps": 5, "schedule": "cosine"}
        return optim.make_optimizer(optim.make_learning_rate(peak=peak, **schedule))

    shared = digits_runs.rate_in_state(make(1.0))
    update = jax.jit(shared.update)
    for rate in (1e-2, 3e-4):
        state = digits_runs.with_rate(step.make_state(params, shared), rate, devices).opt_state
        plain = make(rate)
        expected = plain.init(params)
        for _ in range(3):
            ours, state = update(gradient, state, params)
            theirs, expected = plain.update(gradient, expected, params)
            np.testing.assert_allclose(ours["a"], theirs["a"], rtol=1e-5)


@pytest.mark.slow
def test_a_run_on_a_tiny_model(tmp_path, monkeypatch):
    model, encoded = tiny.write(tmp_path)
    budget = digits_plan.Budget(steps=4, batch_size=8, pairs=64, tuning_images=20, images=20)

    def config(budget):
        about = {"train__steps": budget.steps, "optimizer__schedule": "cosine"}
        prompts = str(digits.PIPELINE / "prompts.txt")
        sampling = {"sample__prompts": prompts, "sample__steps": 2, "sample__guidance_scale": 1.0}
        return tiny.make_config(model, encoded, evaluate__judges=JUDGES, **about, **sampling)

    monkeypatch.setattr(digits_runs, "base_config", config)
    work = epath.Path(tmp_path)
    digits_runs.flip_labels(work, 0.5, seed=0)
    bench = digits_runs.Bench(budget, work)
    slow, fast = (Setting({"beta": 300.0, "alpha": 0.01}, rate) for rate in (1e-3, 1e-2))
    first = bench.run(Trial("dmpo", slow, seed=0))
    again = bench.run(Trial("dmpo", slow, seed=0))
    tuning = bench.run(Trial("dmpo", fast, seed=0, tuning=True))
    noisy = bench.run(Trial("dmpo", slow, seed=0, flipped=0.5))
    assert [len(first["scores"][judge]) for judge in JUDGES] == [20, 20]
    assert set(tuning["scores"]) == set(JUDGES)
    for name in ("scores", "health", "last_updates", "diversity"):  # also after other runs
        assert first[name] == again[name]
    assert max(again["seconds_compiling"], tuning["seconds_compiling"]) < 0.1
    # Ten times the rate; the gradients differ after the first update.
    assert 5 < tuning["last_updates"]["update_norm"] / first["last_updates"]["update_norm"] < 20
    assert noisy["health"]["margin"] != first["health"]["margin"]
    assert noisy["last_updates"]["ties"] == first["last_updates"]["ties"]
    assert first["skipped"] == 0
    json.dumps([first, tuning, noisy])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_small_comparison_from_end_to_end(tmp_path, workers):
    command = [
        sys.executable,
        "benchmarks/study/digits.py",
        "--objectives",
        "dmpo",
        "sft",
        "--steps=2",
    ]
    command += ["--batch_size=8", "--pairs=40", "--images=20", "--seeds=2", f"--workers={workers}"]
    command += [f"--out={tmp_path}", f"--work={tmp_path / 'work'}"]
    subprocess.run(command, check=True)
    results = json.loads((tmp_path / "digits.json").read_text())
    trained = [r for r in results["runs"].values() if r["trial"]["hyperparameters"]]
    assert len(results["runs"]) - len(trained) == 9 + 4 + 2
    assert all(np.isfinite(list(run["health"].values())).all() for run in results["runs"].values())
    subprocess.run([*command, "--noise"], check=True)
    noisy = json.loads((tmp_path / "digits_noise.json").read_text())["runs"]
    assert len(noisy) == 2 * 3 * 2
    for name in ("digits", "digits_noise"):
        for kind in ("md", "png"):
            assert (tmp_path / f"{name}.{kind}").stat().st_size > 0

"""Tests for dmpo_jax/evaluation/statistics.py; coverage is in benchmarks/tests/test_coverage.py."""

import json

import numpy as np
import pytest
import scipy.stats

from dmpo_jax.evaluation import statistics
from dmpo_jax.evaluation.statistics import (
    compare,
    correct,
    detectable,
    diversity,
    pixel_features,
    prompts_needed,
)

LIKE = {"estimand": "like_these", "resamples": 999}
THESE = {"estimand": "these"}


def scores(prompts, images, gain=0.0, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=prompts * images)
    numbers = np.repeat(np.arange(prompts), images)
    return base, base + rng.normal(gain, 1, base.shape), numbers


def test_a_better_model_wins_and_an_equal_one_does_not():
    better = compare(*scores(200, 1, gain=0.4), **LIKE)
    assert better["win_rate_ci95"][0] > 0.5
    assert better["p_value"] < 0.01
    assert better["p_wilcoxon"] < 0.01
    assert better["wins"] + better["losses"] + better["ties"] == better["prompts"] == 200
    base, _, prompts = scores(200, 1)
    same = compare(base, base, prompts, **LIKE)
    assert (same["win_rate"], same["difference"], same["ties"]) == (0.5, 0.0, 200)
    assert same["win_rate_ci95"][0] < 0.5 < same["win_rate_ci95"][1]
    assert (same["p_value"], same["p_wilcoxon"], same["effect_size"]) == (1.0, 1.0, None)
    assert same["difference_ci95"] == [0.0, 0.0]


def test_swapped_models_mirror():
    base, policy, prompts = scores(60, 2, gain=0.3)
    for how in (LIKE, THESE):
        one, other = compare(base, policy, prompts, **how), compare(policy, base, prompts, **how)
        assert one["win_rate"] == pytest.approx(1 - other["win_rate"])
        np.testing.assert_allclose(
            one["win_rate_ci95"], 1 - np.array(other["win_rate_ci95"])[::-1], atol=1e-12
        )
        assert one["p_value"] == pytest.approx(other["p_value"])
        assert one["effect_size"] == pytest.approx(-other["effect_size"])
        assert (one["wins"], one["ties"]) == (other["losses"], other["ties"])


def test_more_images_of_one_prompt_are_no_more_prompts():
    """Copies of each image leave everything as it is: by image, the interval would shrink."""
    base, policy, prompts = scores(50, 1, gain=0.2)
    one = compare(base, policy, prompts, **LIKE)
    nine = compare(*(np.repeat(x, 9) for x in (base, policy, prompts)), **LIKE)
    assert nine.pop("images_per_prompt") == 9
    assert one.pop("images_per_prompt") == 1
    assert nine == {name: pytest.approx(value) for name, value in one.items()}


def test_prompts_weigh_the_same_however_many_images_they_have():
    base = np.zeros(5)
    policy = np.array([1.0, 1, 1, 1, -1])
    prompts = np.array([7, 7, 7, 7, 3])  # any numbers, in any order
    found = compare(base, policy, prompts, **LIKE)
    assert found["win_rate"] == 0.5
    assert found["difference"] == found["score_policy"] == 0.0
    assert found["images_per_prompt"] == 2.5
    with pytest.raises(ValueError, match="at least two images"):
        compare(base, policy, prompts, **THESE)


def test_these_prompts_are_surer_than_prompts_like_these():
    """Where prompts differ much: half are always won, half always lost."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 4)
    policy = np.where(prompts % 2, 1.0, -1.0) + rng.normal(0, 0.6, prompts.shape)
    width = {
        how["estimand"]: np.ptp(compare(np.zeros(160), policy, prompts, **how)["win_rate_ci95"])
        for how in (LIKE, THESE)
    }
    assert width["these"] < 0.5 * width["like_these"]


def test_methods():
    assert compare(*scores(30, 1), **LIKE)["interval"] == "bootstrap"
    few = compare(*scores(29, 3, gain=0.3), **LIKE)
    assert few["interval"] == "t"
    base, policy, _ = scores(29, 3, gain=0.3)
    means = (policy > base).reshape(29, 3).mean(1)
    theirs = scipy.stats.ttest_1samp(means, 0.5).confidence_interval()
    np.testing.assert_allclose(few["win_rate_ci95"], theirs)
    base = np.arange(12.0)
    won = compare(base, base + 1, np.arange(12), **LIKE)
    assert (won["interval"], won["wins"], won["win_rate"]) == ("wilson", 12, 1.0)
    theirs = scipy.stats.binomtest(12, 12).proportion_ci(method="wilson")
    np.testing.assert_allclose(won["win_rate_ci95"], theirs)
    assert won["difference_ci95"] == [1.0, 1.0]
    assert compare(*scores(10, 8), **THESE)["interval"] == "welch"


def test_the_sign_test_counts_half_of_what_was_seen():
    base = np.zeros(12)
    policy = np.array([1.0] * 8 + [-1.0] * 2 + [0.0] * 2)  # ties are left out
    found = compare(base, policy, np.arange(12), **LIKE)
    exact = scipy.stats.binomtest(8, 10).pvalue
    assert found["p_value"] == pytest.approx(exact - scipy.stats.binom.pmf(2, 10, 0.5))
    assert (found["wins"], found["losses"], found["ties"], found["unit"]) == (8, 2, 2, "prompt")


def test_welch_is_scipys_for_two_prompts():
    """The mean of two prompts' means has the interval of their difference, one turned round."""
    base, policy, prompts = scores(2, 30, gain=0.5)
    found = compare(base, policy, prompts, **THESE)["difference_ci95"]
    first, second = (policy - base).reshape(2, 30)
    theirs = scipy.stats.ttest_ind(first, -second, equal_var=False).confidence_interval()
    np.testing.assert_allclose(found, np.array(theirs) / 2)


@pytest.mark.parametrize("estimand", ["like_these", "these"])
@pytest.mark.parametrize(
    "values", [[0.0], [0.0, 0.0], [1.0, -1.0], [1.0, 1.0], [0.1, 0.1, 0.1], [1.0, 0.0, 0.0]]
)
@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("one_prompt", [False, True])
def test_edge_cases_give_plain_json(estimand, values, images, one_prompt):
    gains = np.repeat(values, images)
    prompts = np.zeros(len(gains), int) if one_prompt else np.repeat(np.arange(len(values)), images)
    if estimand == "these" and np.unique(prompts, return_counts=True)[1].min() < 2:
        with pytest.raises(ValueError, match="at least two images"):
            compare(np.zeros(len(gains)), gains, prompts, estimand=estimand)
        return
    found = compare(np.full(len(gains), 0.7), 0.7 + gains, prompts, estimand=estimand)
    correct([found])
    json.dumps(found, allow_nan=False)
    low, high = found["win_rate_ci95"]
    assert 0 <= low <= found["win_rate"] <= high <= 1


def test_scores_that_are_no_numbers_or_none_at_all():
    ones, prompts = np.ones(4), np.arange(4)
    for bad in (np.nan, np.inf):
        for base, policy in ((ones, ones * bad), (ones * bad, ones)):
            with pytest.raises(ValueError, match="NaN or infinite"):
                compare(base, policy, prompts, **LIKE)
    with pytest.raises(ValueError, match="no scores"):
        compare(np.zeros(0), np.zeros(0), np.zeros(0, int), **LIKE)


def test_a_winner_is_named_after_correction_only():
    def entry(p, wins, losses, rate):
        return {"p_value": p, "wins": wins, "losses": losses, "win_rate": rate}

    entries = [
        entry(0.001, 9, 1, 0.9),
        entry(0.02, 1, 9, 0.1),
        entry(0.04, 9, 1, 0.9),  # below 0.05 alone; corrected 0.04 * 4 / 3
        entry(0.9, 5, 5, 0.5),
    ]
    assert correct(entries) is entries
    assert [e["winner"] for e in entries] == ["policy", "base", None, None]
    assert [e["p_corrected"] for e in entries] == pytest.approx([0.004, 0.04, 0.16 / 3, 0.9])
    (odd,) = correct([entry(0.001, 9, 1, 0.4)])  # many narrow prompts won, few wide ones lost
    assert odd["winner"] is None
    assert correct([]) == []


def test_agreement_of_scorers():
    x = np.arange(20.0)
    found = statistics.agreement({"a": x, "b": x**3, "c": -x, "d": np.zeros(20)})
    assert {(f["a"], f["b"]): f["spearman"] for f in found} == {
        ("a", "b"): 1.0,
        ("a", "c"): -1.0,
        ("a", "d"): None,
        ("b", "c"): -1.0,
        ("b", "d"): None,
        ("c", "d"): None,
    }


def test_power():
    assert [prompts_needed(rate) for rate in (0.52, 0.55, 0.6)] == [4898, 782, 194]
    assert prompts_needed(0.4) == 194
    for rate in (0.501, 0.52, 0.6, 0.9):
        needed = prompts_needed(rate)
        assert detectable(needed) <= rate + 1e-9
        assert detectable(needed - 1) >= rate - 1e-9
    assert detectable(1) == detectable(3) == 1.0
    assert detectable(10**7) > 0.5
    with pytest.raises(ValueError, match=r"not 1/2, but is 0\.5"):
        prompts_needed(0.5)


def test_diversity_is_the_mean_over_all_pairs():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(9, 5))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    prompts = np.array([4, 4, 1, 4, 1, 9, 4, 1, 2])
    cosines = features @ features.T
    want = []
    for prompt in (1, 4):  # 2 and 9 have one image
        rows = np.flatnonzero(prompts == prompt)
        pairs = [(i, j) for i in rows for j in rows if i < j]
        want.append(np.mean([1 - cosines[i, j] for i, j in pairs]))
    np.testing.assert_allclose(diversity(features, prompts), want)
    same = diversity(np.repeat(features[:1], 3, 0).astype(np.float32), np.zeros(3, int))
    assert same == pytest.approx([0], abs=1e-6)


def test_pixel_features_tell_images_apart():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
    flat = np.full((64, 64, 3), 128, np.uint8)
    dark, bright = flat - 100, flat + 100
    features = pixel_features(np.stack([dark, bright, noise, flat]))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
    apart = diversity(features[:2], np.zeros(2, int))
    assert apart == pytest.approx([2], abs=1e-3)
    assert 0.5 < diversity(features[[0, 2]], np.zeros(2, int))[0] < 1.5
    same = pixel_features(np.stack([noise, noise]))
    assert diversity(same, np.zeros(2, int)) == pytest.approx([0], abs=1e-6)

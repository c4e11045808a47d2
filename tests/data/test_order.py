"""Tests for dmpo_jax/data/batches/order.py."""

import collections

import numpy as np
import pytest

from dmpo_jax.data.batches import order
from dmpo_jax.data.batches.order import Draws, Order, counts_of, whole_parts


def mixed(lengths=(22, 9, 40), weights=(2, 1, 0.5), seed=7):
    return Order(lengths, weights, seed=seed)


def test_one_set_keeps_the_order_it_always_had():
    """Recorded before there were mixtures: a run must go on as it began."""
    alone = Order([22], [3], seed=7)
    elements = [*range(10), 22, 23, 24, 10**9]
    assert [alone[i] for i in elements] == [
        (0, record) for record in (7, 9, 0, 8, 14, 20, 17, 6, 10, 1, 6, 12, 20, 7)
    ]


def test_dropout_keeps_the_draws_it_always_had():
    for flip in (False, True):
        draws = Draws(seed=7, prompt_dropout=0.3, drops_images=True, flip=flip)
        drawn = np.array([draws(i) for i in range(30)])
        assert np.flatnonzero(drawn[:, 0]).tolist() == [5, 7, 10, 13, 15, 18, 23]
        assert np.flatnonzero(drawn[:, 1]).tolist() == [2, 9, 11, 12, 16, 18, 19, 23, 25, 26]


def test_half_are_flipped_whatever_is_dropped():
    drawn = np.array(
        [Draws(seed=1, prompt_dropout=0.5, drops_images=False, flip=True)(i) for i in range(4000)]
    )
    tolerance = 4 * np.sqrt(0.25 / 4000)
    assert abs(drawn[:, 2].mean() - 0.5) < tolerance
    assert abs(drawn[:, [0, 2]].all(1).mean() - 0.25) < tolerance
    unasked = Draws(seed=1, prompt_dropout=0.5, drops_images=False, flip=False)
    assert not any(unasked(i)[2] for i in range(100))
    other = Draws(seed=2, prompt_dropout=0.5, drops_images=False, flip=True)
    assert [other(i)[2] for i in range(100)] != drawn[:100, 2].tolist()
    assert (drawn[:, 2] == drawn[:, 3]).all()


def test_each_image_is_flipped_by_itself():
    options = {"seed": 1, "prompt_dropout": 0.5, "drops_images": False}
    each, both = Draws(flip=True, flip_each=True, **options), Draws(flip=True, **options)
    drawn = np.array([each(i) for i in range(4000)])
    assert (drawn[:, :3] == [both(i)[:3] for i in range(4000)]).all()  # nothing else is drawn anew
    tolerance = 4 * np.sqrt(0.25 / 4000)
    for chosen in (False, True):
        share = drawn[drawn[:, 2] == chosen, 3].mean()
        assert abs(share - 0.5) < tolerance * np.sqrt(2)
    without = Draws(flip=False, flip_each=True, **options)
    assert not any(without(i)[2] or without(i)[3] for i in range(100))


@pytest.mark.parametrize("parts", [(1,), (1, 1), (4, 2, 1), (1, 1000), (7, 3, 5, 2)])
def test_shares_are_exact_and_never_fall(parts):
    before = [0] * len(parts)
    for n in range(1, 3 * sum(parts) + 1):
        counts = counts_of(n, parts)
        assert sum(counts) == n
        assert sorted(b - a for a, b in zip(before, counts, strict=True))[-2:] in ([1], [0, 1])
        assert np.abs(counts - np.array(parts) * n / sum(parts)).max() < len(parts)
        before = counts
    assert before == [3 * part for part in parts]


def test_far_elements_take_no_longer(monkeypatch):
    """Structure, not time: one block is made, wherever the element lies."""
    made = []

    def counted(n, parts):
        made.append(n)
        return counts_of(n, parts)

    monkeypatch.setattr(order, "counts_of", counted)
    far = 10**6 * 2048
    assert 0 <= mixed()[far][1] < 40
    assert made == [far // order.BLOCK * order.BLOCK, (far // order.BLOCK + 1) * order.BLOCK]
    assert counts_of(far, (2, 1)) == pytest.approx([far * 2 / 3, far / 3], abs=1)


@pytest.mark.parametrize(
    ("weights", "parts"),
    [([0.1, 0.3], (1, 3)), ([2, 1], (2, 1)), ([0.5, 1, 1e-3], (500, 1000, 1)), ([7], (1,))],
)
def test_weights_are_taken_as_written(weights, parts):
    assert whole_parts(weights) == parts


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_refuses_what_is_no_weight(weight):
    with pytest.raises(ValueError, match="weights must be above 0 and finite"):
        mixed(weights=(1, 1, weight))


@pytest.mark.long
def test_sets_come_by_weight_and_each_in_its_own_epochs():
    lengths, weights = (22, 9, 40), (2, 1, 0.5)
    chosen, seen = mixed(), collections.defaultdict(list)
    for i in range(2 * order.BLOCK):
        source, record = chosen[i]
        seen[source].append(record)
        if (i + 1) % order.BLOCK == 0:
            for s, weight in enumerate(weights):
                assert len(seen[s]) == pytest.approx((i + 1) * weight / 3.5, abs=3)
    for s, length in enumerate(lengths):
        whole = len(seen[s]) // length
        epochs = np.array(seen[s][: whole * length]).reshape(whole, length)
        assert (np.sort(epochs) == np.arange(length)).all()
        assert (epochs[0] != epochs[1]).any()


def test_an_element_is_a_function_of_seed_and_number_alone():
    numbers = np.random.default_rng(0).permutation(2100)
    whole = [mixed()[i] for i in range(0, 2100, 100)]
    again = mixed()
    found = {int(i): again[int(i)] for i in numbers}
    assert [found[i] for i in range(0, 2100, 100)] == whole
    other = mixed(seed=8)
    assert [other[i][0] for i in range(100)] != [found[i][0] for i in range(100)]


def test_no_row_of_the_batch_holds_one_set_alone():
    chosen = mixed(lengths=(50, 50), weights=(1, 1))
    rows = np.array([chosen[i][0] for i in range(64 * 8)]).reshape(64, 8)
    assert (rows.min(0) == 0).all()
    assert (rows.max(0) == 1).all()
    # Sets of one length are not shuffled alike.
    by_source = [[chosen[i][1] for i in range(64) if chosen[i][0] == s] for s in (0, 1)]
    assert by_source[0][:20] != by_source[1][:20]

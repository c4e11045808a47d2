"""Every objective against float64 where float32 has it hardest: large beta, any size of error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.objectives import OBJECTIVES
from tests.support.plain_objectives import HELD, ROWS

SIZES = 10.0 ** np.arange(-8, 5)  # of an image's mean squared error
STEPS = (1e-4, 1e-2, 1.0)  # of policy - reference, in parts of the policy's error
BETAS = (1e-3, 0.1, 30.0, 1e4)
LABELS = np.array([1.0, 0.5, 0.7, 1.0], np.float32)


def cases(name):
    """Hyperparameters over all betas, and for alpha_divergence all of the family."""
    args = ROWS[name].args
    for beta in BETAS if "beta" in args else (None,):
        row = args if beta is None else {**args, "beta": beta}
        for order in (0, 1e-6, 0.3, 0.8, 1) if "order" in args else (None,):
            yield row if order is None else {**row, "order": order}


def pairs(seed):
    """(policy, reference, target) float32 [B, 2, 4, 4, 2] and labels, over all sizes and steps."""
    rng = np.random.default_rng(seed)
    rows = []
    for size in SIZES:
        for step in STEPS:
            shape = (4, 2, 4, 4, 2)
            target = rng.normal(size=shape)
            # Each image's own size, so that one of a pair may be far better than the other.
            error = rng.normal(size=shape) * np.sqrt(
                size * 10 ** rng.uniform(-1, 0, (4, 2, 1, 1, 1))
            )
            way = step * error * rng.normal(size=shape)
            rows.append((target + error, target + error - way, target))
    arrays = (np.concatenate(x).astype(np.float32) for x in zip(*rows, strict=True))
    return *arrays, np.tile(LABELS, len(rows))


def in_float64(triple, labels):
    """The same numbers, wider."""
    return [x.astype(np.float64) for x in triple], labels.astype(np.float64)


def jittered(triple, rng):
    """The same with every error and every step off by about a rounding of float32."""
    policy, reference, target = triple

    def off(x):
        return x * (1 + 2e-7 * rng.normal(size=x.shape))

    error, way = off(policy - target), off(policy - reference)
    return target + error, target + error - way, target


@pytest.mark.parametrize("name", ROWS)
def test_relative_error_where_float32_can_hold_it(name):
    *triple, labels = pairs(0)
    exact, wide = in_float64(triple, labels)
    rng = np.random.default_rng(1)
    others = [jittered(exact, rng) for _ in range(6)]
    objective, plain = OBJECTIVES[name], ROWS[name].plain
    held_in_all, count = 0, 0
    labels_in_jax = jnp.asarray(labels)
    for args in cases(name):
        want = plain(*exact, wide, **args)
        # Where a rounding of the inputs alone moves the loss by more than this, no arithmetic
        # in float32 could do better: about the minimum, and where the two images cancel.
        moved = np.max([np.abs(plain(*other, wide, **args) - want) for other in others], axis=0)
        held = moved <= 2e-6 * np.abs(want)
        got = np.asarray(objective(*map(jnp.asarray, triple), preference=labels_in_jax, **args))
        assert np.isfinite(got).all()
        # Losses that are differences of numbers near 1 end at 1e-16 in float64.
        np.testing.assert_allclose(got[held], want[held], rtol=1e-5, atol=1e-14, err_msg=str(args))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-14 + 3 * moved.max())
        held_in_all, count = held_in_all + held.sum(), count + held.size
    assert held_in_all > 0.5 * count


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_gradients_are_finite_everywhere(name):
    *triple, labels = pairs(2)
    policy, reference, target = map(jnp.asarray, triple)
    equals = (reference, target)
    for args in cases(name):

        def loss(p, r, args=args):
            return OBJECTIVES[name](p, r, target, jnp.asarray(labels), **args).sum()

        grad = jax.grad(loss)
        for p in (policy, *equals):
            assert np.isfinite(np.asarray(grad(p, reference))).all(), args


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_gradients_against_finite_differences(name):
    """In float64, along each image's own error and step: d loss / d log size."""
    *triple, labels = pairs(3)
    exact, wide = in_float64(triple, labels)
    rng = np.random.default_rng(4)
    others = [jittered(exact, rng) for _ in range(4)]
    directions = [
        (exact[0] - part).astype(np.float32).astype(np.float64) for part in (exact[2], exact[1])
    ]
    told, count = 0, 0
    for args in cases(name):

        def slope(at, direction, width, args=args):
            held = {"held": at[0]} if name in HELD else {}
            up, down = (
                ROWS[name].plain(at[0] + h * direction, *at[1:], wide, **args, **held)
                for h in (width, -width)
            )
            return (up - down) / (2 * width)

        def ours(p, args=args):
            rest = map(jnp.asarray, (*triple[1:], labels))
            return OBJECTIVES[name](p, *rest, **args)

        for direction in directions:
            primal, tangent = (jnp.asarray(x, jnp.float32) for x in (triple[0], direction))
            loss, got = jax.jvp(ours, (primal,), (tangent,))
            want = slope(exact, direction, 1e-5)
            other_widths = (np.abs(slope(exact, direction, h) - want) for h in (1e-4, 1e-6))
            moved = [np.abs(slope(other, direction, 1e-5) - want) for other in others]
            # What differences cannot tell: they bend if wide, and round if narrow.
            blur = np.minimum(*other_widths) + 1e-6 * np.abs(loss) + 1e-11
            allowed = 1e-4 * np.abs(want) + 3 * np.max(moved, axis=0) + 3 * blur
            over = np.abs(got - want) / allowed
            i = over.argmax()
            assert over[i] <= 1, (args, i, got[i], want[i], allowed[i])
            steep = np.abs(want) > 1e-2 * np.abs(loss)
            told += (steep & (allowed <= 1e-2 * np.abs(want))).sum()
            count += steep.sum()
    assert told > 0.6 * count > 40, (told, count)

"""Tests of benchmarks/study/mode_seeking.py at a tiny budget."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "study"


@pytest.fixture(scope="module")
def bench():
    """The program's module, imported as a script: with its neighbours on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import mode_seeking

        yield mode_seeking
    for name in ("mode_seeking", "mode_seeking_report", "mixtures"):
        sys.modules.pop(name, None)


def total(grid, log_density):
    return np.exp(log_density).sum() * grid.area


def test_the_grids_hold_all_of_the_optimum_and_the_reference(bench):
    for grid in (bench.GRID, bench.COARSE):
        for mixture in (bench.OPTIMUM, bench.REFERENCE):
            assert total(grid, grid.log_density(mixture)) == pytest.approx(1, abs=2e-5)


def test_the_optimum_is_the_reference_tilted_by_the_reward(bench):
    for beta in (0.25, 1.0, 4.0):
        data = bench.make_groups(bench.Method(reverse=True), beta, np.random.default_rng(0), 64)
        odds = data.log_label[:, 0] - data.log_label[:, 1]
        log_ratio = np.asarray(bench.OPTIMUM.log_density(data.points)) - data.log_reference
        # Bradley-Terry: a label's odds are the difference of rewards, beta times the ratios'.
        difference = beta * (log_ratio[:, 0] - log_ratio[:, 1])
        np.testing.assert_allclose(odds, difference, atol=1e-4)
        everywhere = bench.Method(reverse=True, candidates=None)
        whole = bench.make_groups(everywhere, beta, np.random.default_rng(0), 0)
        loss = bench.mean_loss(bench.OPTIMUM, whole, beta, reverse=True)
        assert abs(float(loss)) < 1e-5


def test_numbers_of_known_policies(bench):
    found = bench.measure(bench.OPTIMUM)
    assert found["reverse_kl"] == found["forward_kl"] == 0
    parts = np.array(found["on_modes"])
    assert (parts > 0.9 * bench.WEIGHTS).all()
    assert (np.argsort(-parts) == np.argsort(-bench.WEIGHTS)).all()
    assert parts.sum() + found["elsewhere"] == pytest.approx(1)
    # Two Gaussians, in closed form, on the same grid.
    one, other = (
        bench.round_mixture(np.ones(1), np.array([[x, 0.0]]), [s]) for x, s in ((0, 0.8), (1, 1.1))
    )
    logs = [bench.GRID.log_density(x) for x in (one, other)]
    found = bench.compare(bench.GRID, *logs, bench.MODES, bench.RADIUS)
    ratio = (0.8 / 1.1) ** 2
    want = ratio - 1 - np.log(ratio) + 0.5 / 1.1**2
    assert found["reverse_kl"] == pytest.approx(want, rel=1e-6)


def test_a_fit_has_the_points_mean_and_covariance(bench):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(4000, 2)) @ np.array([[1.0, 0.6], [0.0, 0.5]]) + 1
    found = bench.fit(points, 1, 0)
    policy = np.exp(bench.GRID.log_density(found)) * bench.GRID.area
    mean = policy @ bench.GRID.points
    away = bench.GRID.points - mean[None]
    np.testing.assert_allclose(mean, points.mean(0), atol=1e-4)
    np.testing.assert_allclose(away.T @ (policy[:, None] * away), np.cov(points.T), atol=1e-3)


def test_the_losses_are_the_packages_own(bench, monkeypatch):
    bench.check_losses()
    monkeypatch.setattr(bench, "divergence", lambda log_p, log_q, reverse: log_p[:, 0] * 0 + 1)
    with pytest.raises(ValueError, match=r"objectives\.dmpo must agree to 1e-6"):
        bench.check_losses()


@pytest.mark.parametrize("reverse", [True, False])
def test_the_loss_of_a_policy_is_least_at_the_optimum(bench, reverse):
    method = bench.Method(reverse=reverse, candidates=8)
    data = bench.make_groups(method, 1.0, np.random.default_rng(0), 512)
    optimum = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), bench.OPTIMUM)
    loss, slope = jax.value_and_grad(bench.mean_loss)(optimum, data, 1.0, reverse=reverse)
    assert abs(float(loss)) < 1e-5
    assert max(float(jnp.abs(x).max()) for x in slope) < 1e-4


@pytest.mark.long
def test_the_program_writes_what_it_says_and_again_the_same(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "GRID", bench.Grid(side=24.0, cells=80))
    monkeypatch.setattr(bench, "RATES", (3e-3, 1e-2))
    monkeypatch.setattr(bench, "POOL", 1024)
    monkeypatch.setattr(bench, "HELD_OUT", 256)
    monkeypatch.setattr(bench, "SETTINGS", bench.SETTINGS[:1])
    pictured = tuple(m for m in bench.METHODS if m.pictured and m.candidates in (2, None))
    monkeypatch.setattr(bench, "METHODS", pictured)
    for name in ("one", "two"):
        bench.main(["--seeds", "2", "--steps", "3", "--out", str(tmp_path / name)])
    result = json.loads((tmp_path / "one" / "mode_seeking.json").read_text())
    rows = result["settings"][0]["rows"]
    assert [r["method"] for r in rows[:4]] == ["optimum", "start", "DPO", "DMPO, alpha 0.01"]
    assert len(rows) == 2 + len(pictured)
    assert rows[0]["reverse_kl"] == rows[0]["forward_kl"] == [0, 0]
    for row in rows[1:]:
        assert row["reverse_kl"][0] > 0.1
        assert row["forward_kl"][0] > 0.1
        parts = [row["elsewhere"], *(row[f"mode {i}"] for i in (1, 2, 3))]
        assert sum(mean for mean, _ in parts) == pytest.approx(1)
    for row in rows[2:]:
        assert row["rate"] in bench.RATES
        assert len(row["runs"]) == 2 * len(bench.RATES)
    table = (tmp_path / "one" / "mode_seeking.md").read_text()
    assert table == (tmp_path / "two" / "mode_seeking.md").read_text()
    assert table in capsys.readouterr().out
    (tmp_path / "one" / "mode_seeking.md").unlink()
    bench.main(["--redraw", "--out", str(tmp_path / "one")])
    assert table == (tmp_path / "one" / "mode_seeking.md").read_text()
    assert table.count("\n| ") == 1 + len(rows)
    assert (tmp_path / "one" / "mode_seeking.png").read_bytes()[:4] == b"\x89PNG"

"""Mode seeking of a small policy in the plane: DPO (forward KL) against DMPO (reverse KL).

    python benchmarks/study/mode_seeking.py [--seeds 5] [--steps 1500] [--out benchmarks/results]

The reference rho is one broad Gaussian. The reward is r = beta log(pi* / rho), where pi* is three
round Gaussians that weigh 60, 25 and 15 % (and 0.2 % of rho, so that the reward is bounded). Since
pi* = rho exp(r / beta), it is exactly the optimum of the RL objective, expected reward less
beta KL(policy || rho). A policy of one Gaussian cannot represent pi*, as a model of images cannot
represent all modes, and the divergences prefer different policies: forward KL one over all modes
and the space between, reverse KL one on a single mode. A policy of four Gaussians can represent
pi*: the control.

Every method starts at the likeliest policy for rho and sees the same points drawn from rho, 512 a
step, with the same Adam and cosine schedule at each of RATES. Reported is the rate with the
smallest own loss on held-out points, averaged over the seeds. With u = beta log(policy / rho) and
K candidates, p = softmax(u) is the implied preference and q the label. DPO and forward KL are
KL(q || p), DMPO and reverse KL are KL(p || q), the losses of dmpo_jax.objectives at K = 2 (checked
at the start). "Drawn" labels are one Bradley-Terry choice per pair, q = (1 - alpha, alpha), with
alpha 0 for DPO. "Exact" labels are softmax(r), at K = 2 the choice's probabilities. For unbounded
K, rho is integrated over a grid. Reverse KL is then the RL objective itself: of the policy at
beta 1, of the policy tilted by beta otherwise (tests/objectives/test_theorem.py).

Writes mode_seeking.json (every rate and seed), .md (the tables) and .png, and prints the tables.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mode_seeking_report
import numpy as np
import optax
from jaxtyping import Float
from mixtures import Grid, Mixture, Numbers, compare, draw, fit, round_mixture

from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.progress import Progress

RESULTS = pathlib.Path(__file__).parents[1] / "results"
MODES = np.array([[-2.0, 0.6], [1.4, 1.6], [1.0, -1.8]])
WEIGHTS = np.array([0.598, 0.25, 0.15])  # the rest of 1 is the reference itself
SPREAD, REFERENCE_SPREAD = 0.6, 1.8
REFERENCE = round_mixture(np.ones(1), np.zeros((1, 2)), [REFERENCE_SPREAD])
OPTIMUM = round_mixture(
    np.append(WEIGHTS, 1 - WEIGHTS.sum()),
    np.append(MODES, np.zeros((1, 2)), 0),
    [SPREAD] * 3 + [REFERENCE_SPREAD],
)
RADIUS = 2.5 * SPREAD  # of the disc that counts as a mode; it holds 96 % of its Gaussian
GRID = Grid(side=24.0, cells=240)
COARSE = Grid(side=16.0, cells=40)  # training points of unbounded K
POOL, HELD_OUT, A_STEP = 32768, 8192, 512  # points
IMPOSSIBLE = -1e30  # the logarithm of a label of 0; finite, since it is multiplied by that 0
RATES = (3e-3, 1e-2, 3e-2)


@dataclasses.dataclass(frozen=True)
class Method:
    """One learning method. candidates None is the entire plane; alpha None is exact labels."""

    reverse: bool
    candidates: int | None = 2
    alpha: float | None = None

    @property
    def name(self) -> str:
        if self.alpha is not None:
            return f"DMPO, alpha {self.alpha}" if self.reverse else "DPO"
        return "reverse KL" if self.reverse else "forward KL"

    @property
    def sees(self) -> str:
        if self.candidates is None:
            return "all"
        return f"{self.candidates}, {'exact' if self.alpha is None else 'drawn'}"

    @property
    def pictured(self) -> bool:
        return self.candidates != 2 or self.alpha in (0.0, 0.01)


METHODS = (
    Method(reverse=False, alpha=0.0),
    Method(reverse=True, alpha=0.01),
    Method(reverse=True, alpha=0.1),
    *(Method(reverse, k) for k in (2, 8, 32, None) for reverse in (False, True)),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Number of Gaussians in the policy, and beta."""

    components: int = 1
    beta: float = 1.0

    @property
    def name(self) -> str:
        policy = "one Gaussian" if self.components == 1 else f"{self.components} Gaussians"
        return f"Policy of {policy}, beta {self.beta:g}"


SETTINGS = (Setting(), Setting(beta=0.25), Setting(beta=4.0), Setting(2), Setting(4))


class Groups(NamedTuple):
    """N groups of K candidates. log_base is an additional log weight: 0 for drawn candidates."""

    points: Float[Numbers, "N K 2"]
    log_reference: Float[Numbers, "N K"]
    log_base: Float[Numbers, "N K"]
    log_label: Float[Numbers, "N K"]


def divergence(log_p: jax.Array, log_q: Numbers, *, reverse: bool) -> jax.Array:
    """Computes KL(p || q), or KL(q || p) where log_q may be IMPOSSIBLE, over the last axis."""
    first, second = (log_p, log_q) if reverse else (log_q, log_p)
    return (jnp.exp(first) * (first - second)).sum(-1)


def check_losses() -> None:
    """Checks that the two formulas of u are the package's own objectives.

    Raises:
        ValueError: if one differs by more than float32 rounding.
    """
    u = np.linspace(-8, 8, 65, dtype=np.float32)
    # One number an image: the chosen one brings u, see `margin`.
    pairs = [np.stack([np.sqrt(np.maximum(s * u, 0)), 0 * u], 1) for s in (-1, 1)]
    policy, reference = (jnp.asarray(x)[:, :, None, None, None] for x in pairs)
    log_p = jax.nn.log_softmax(jnp.stack([u, 0 * u], -1))
    for alpha in (0.01, 0.1):
        log_q = jnp.broadcast_to(jnp.log(jnp.array([1 - alpha, alpha])), log_p.shape)
        for name, extra in (("dmpo", "alpha"), ("diffusion_dpo", "label_smoothing")):
            row: dict[str, Any] = {"beta": 2.0, extra: alpha}
            theirs = OBJECTIVES[name](policy, reference, jnp.zeros_like(policy), **row)
            ours = divergence(log_p, log_q, reverse=name == "dmpo")
            if name != "dmpo":  # cross entropy has the label's own entropy on top
                ours = ours - (jnp.exp(log_q) * log_q).sum(-1)
            error = float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())
            if not error < 1e-6:
                raise ValueError(
                    f"the loss of u here and objectives.{name} must agree to 1e-6, got {error:.1e} "
                    f"at alpha {alpha}: the formula in benchmarks/study/mode_seeking.py is wrong"
                )


def make_groups(method: Method, beta: float, rng: np.random.Generator, count: int) -> Groups:
    """Draws `count` reference points in labelled groups of K; if K is None, the entire plane."""
    if method.candidates is None:
        points, candidates = COARSE.points, len(COARSE.points)
    else:
        points, candidates = draw(REFERENCE, count, rng), method.candidates
    points = points.reshape(-1, candidates, 2)
    log_reference = np.asarray(REFERENCE.log_density(points))
    # Also in closed form: the components' shares of a point, each times w*_i / w_i.
    reward = beta * (np.asarray(OPTIMUM.log_density(points)) - log_reference)
    base = log_reference if method.candidates is None else np.zeros_like(reward)
    log_label = np.asarray(jax.nn.log_softmax(reward + base, axis=-1))
    if method.alpha is not None:
        chosen = np.log(rng.random(len(points))) < log_label[:, 0]
        log_alpha = np.log(method.alpha) if method.alpha else IMPOSSIBLE
        log_other = np.log1p(-method.alpha)
        log_label = np.where(np.stack([chosen, ~chosen], 1), log_other, log_alpha)
    return Groups(*(np.asarray(x, np.float32) for x in (points, log_reference, base, log_label)))


def mean_loss(policy: Mixture, groups: Groups, beta: float, *, reverse: bool) -> jax.Array:
    """Mean loss over the N groups."""
    ratio = policy.log_density(groups.points) - groups.log_reference
    log_p = jax.nn.log_softmax(beta * ratio + groups.log_base)
    return divergence(log_p, groups.log_label, reverse=reverse).mean()


@partial(jax.jit, static_argnames=("reverse", "steps"))
def train(
    start: Mixture,
    data: Groups,
    held_out: Groups,
    rate: jax.Array,
    seed: jax.Array,
    beta: float,
    *,
    reverse: bool,
    steps: int,
) -> tuple[Mixture, jax.Array]:
    """Trains by Adam; returns the policy and its loss on held-out groups, over rates and seeds.

    start, data, held_out and seed have a leading axis of seeds; rate has an axis of its own.
    Results have leading axes `[rates, seeds]`.
    """

    def one(start: Mixture, data: Groups, held_out: Groups, seed: jax.Array, rate: jax.Array):
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
        total, candidates = data.log_label.shape
        batch = min(max(A_STEP // candidates, 1), total)
        slope = jax.grad(partial(mean_loss, beta=beta, reverse=reverse))

        def step(state, i):
            policy, moments = state
            key = jax.random.fold_in(jax.random.key(seed), i)
            rows = jax.random.randint(key, (batch,), 0, total)
            updates, moments = optimizer.update(
                slope(policy, Groups(*(x[rows] for x in data))), moments
            )
            return (jax.tree.map(jnp.add, policy, updates), moments), None

        (policy, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(steps))
        return policy, mean_loss(policy, held_out, beta, reverse=reverse)

    over_seeds = jax.vmap(one, (0, 0, 0, 0, None))
    return jax.vmap(over_seeds, (None, None, None, None, 0))(start, data, held_out, seed, rate)


def stack(trees: list[Any]) -> Any:
    """Stacks equal trees into one of float32 arrays with a leading axis."""
    return jax.tree.map(lambda *x: np.stack([np.asarray(y, np.float32) for y in x]), *trees)


def measure(policy: Mixture) -> dict[str, Any]:
    """Compares a policy with the optimum by `compare`."""
    log_policy = GRID.log_density(policy)
    return compare(GRID, log_policy, GRID.log_density(OPTIMUM), MODES, RADIUS)


def run_method(
    method: Method, setting: Setting, starts: list[Mixture], seeds: int, steps: int
) -> dict[str, Any]:
    """Trains every rate and seed of one method; chooses the rate by its own held-out loss."""

    def groups(kind: int, count: int) -> Groups:
        # The generator depends on the seed alone: every method gets the same points.
        return stack(
            [
                make_groups(method, setting.beta, np.random.default_rng([s, kind]), count)
                for s in range(seeds)
            ]
        )

    began = time.perf_counter()
    trained, loss = train(
        stack(starts),
        groups(1, POOL),
        groups(2, HELD_OUT),
        jnp.array(RATES),
        jnp.arange(seeds),
        setting.beta,
        reverse=method.reverse,
        steps=steps,
    )
    loss = np.asarray(loss, np.float64)
    usable = np.where(np.isfinite(loss).all(1), loss.mean(1), np.inf)
    runs = []
    for i, rate in enumerate(RATES):
        for s in range(seeds):
            policy = jax.tree.map(lambda x, i=i, s=s: np.asarray(x[i, s], np.float64), trained)
            parameters = {k: v.tolist() for k, v in policy._asdict().items()}
            runs.append(
                {"rate": rate, "seed": s, "loss": loss[i, s], **measure(policy)}
                | {"policy": parameters}
            )
    chosen = RATES[int(usable.argmin())]
    seconds = time.perf_counter() - began
    row = {"method": method.name, "candidates": method.sees, "rate": chosen}
    return (
        row
        | summarise([r for r in runs if r["rate"] == chosen])
        | {"seconds": seconds, "runs": runs}
    )


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Computes mean and standard deviation over the runs of each number of `compare`."""
    columns = {k: np.array([r[k] for r in runs]) for k in ("reverse_kl", "forward_kl", "elsewhere")}
    modes = np.array([r["on_modes"] for r in runs])
    columns |= {f"mode {i + 1}": modes[:, i] for i in range(len(MODES))}
    return {k: [float(v.mean()), float(v.std())] for k, v in columns.items()}


def run_setting(setting: Setting, seeds: int, steps: int, progress: Progress) -> dict[str, Any]:
    """Measures the optimum, the start and every method."""
    starts = [
        fit(draw(REFERENCE, POOL, np.random.default_rng([s, 0])), setting.components, s)
        for s in range(seeds)
    ]
    rows: list[dict[str, Any]] = []
    for name, policies in (("optimum", [OPTIMUM]), ("start", starts)):
        blank = {"method": name, "candidates": "", "rate": None}
        rows.append(blank | summarise([measure(p) for p in policies]))
    for method in METHODS:
        rows.append(run_method(method, setting, starts, seeds, steps))
        progress.advance(reverse_kl=rows[-1]["reverse_kl"][0])
    return {"setting": setting.name, **dataclasses.asdict(setting), "rows": rows}


def picture(found: dict[str, Any], path: pathlib.Path) -> None:
    """Draws seed 0 of each K of one setting beside reference and optimum."""

    def density(mixture: Mixture) -> np.ndarray:
        return np.exp(GRID.log_density(mixture)).reshape(GRID.cells, GRID.cells)

    def shown(method: Method, row: dict[str, Any]) -> dict[str, Any]:
        run = next(r for r in row["runs"] if r["rate"] == row["rate"] and r["seed"] == 0)
        policy = Mixture(**{k: np.array(v) for k, v in run["policy"].items()})
        title = f"{method.name}, K = {method.candidates or '∞'}"
        caption = "KL(policy ‖ optimum) {reverse_kl:.2f}\nKL(optimum ‖ policy) {forward_kl:.2f}"
        return {"title": title, "caption": caption.format(**run), "density": density(policy)}

    optimum = density(OPTIMUM)
    known = [
        {"title": "reference, where all start", "caption": "", "density": density(REFERENCE)},
        {"title": "optimum", "caption": "", "density": optimum},
    ]
    rows = [(m, r) for m, r in zip(METHODS, found["rows"][2:], strict=True) if m.pictured]
    learned = [[shown(m, r) for m, r in rows if m.reverse == side] for side in (False, True)]
    title = (
        "One Gaussian, three modes, K candidates a prompt: "
        "forward KL (DPO, above) and reverse KL (DMPO, below)"
    )
    mode_seeking_report.save_picture(path, GRID.axis, known, learned, optimum, MODES, title)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="of points, labels and start (5)")
    parser.add_argument("--steps", type=int, default=1500, help="of Adam (1500)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help=f"a folder ({RESULTS})")
    parser.add_argument(
        "--redraw", action="store_true", help="tables and picture from the .json in --out"
    )
    args = parser.parse_args(arguments)
    if args.redraw:
        found = json.loads((args.out / "mode_seeking.json").read_text())["settings"]
    else:
        found = run_all(args.out, args.seeds, args.steps)
    tables = "\n\n".join(mode_seeking_report.table(x, len(MODES)) for x in found)
    (args.out / "mode_seeking.md").write_text(tables + "\n")
    picture(found[0], args.out / "mode_seeking.png")
    print(tables)
    print(f"written to {args.out}/mode_seeking.json, .md and .png")


def run_all(out: pathlib.Path, seeds: int, steps: int) -> list[dict[str, Any]]:
    """Runs every setting; after each, mode_seeking.json is rewritten with all complete ones."""
    check_losses()
    out.mkdir(parents=True, exist_ok=True)
    began, found = time.perf_counter(), []
    with Progress(len(SETTINGS) * len(METHODS), description="mode seeking") as progress:
        for setting in SETTINGS:
            found.append(run_setting(setting, seeds, steps, progress))
            write(out, found, seeds, steps, time.perf_counter() - began)
    return found


def write(
    out: pathlib.Path, found: list[dict[str, Any]], seeds: int, steps: int, seconds: float
) -> None:
    result = {
        "seeds": seeds,
        "steps": steps,
        "rates": RATES,
        "points_a_step": A_STEP,
        "pool": POOL,
        "modes": MODES.tolist(),
        "weights": WEIGHTS.tolist(),
        "spread": SPREAD,
        "reference_spread": REFERENCE_SPREAD,
        "packages": {name: version(name) for name in ("jax", "optax", "scikit-learn")},
        "cores": len(os.sched_getaffinity(0)),
        "seconds": seconds,
        "settings": found,
    }
    (out / "mode_seeking.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

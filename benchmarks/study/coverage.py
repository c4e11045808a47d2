"""Coverage of the intervals, and size of the tests, of dmpo_jax.evaluation.statistics.compare.

    python benchmarks/study/coverage.py [--draws 2000] [--resamples 1999] [--out benchmarks/results]

Draws many evaluations whose true win rate is known, and counts how often the 95 % interval holds
it. The difference of image j of prompt i is mu + sqrt(icc) a_i + sqrt(1 - icc) e_ij, with standard
normal a and e; the policy wins where it is above 0, so that the win rate over prompts like these is
Phi(mu), and over these prompts the mean of Phi((mu + sqrt(icc) a_i) / sqrt(1 - icc)).

A model against itself has mu = 0 and icc = 0: the table says how often a winner is named, which a
test at 5 % should do in 5 % of draws. The sign test is discrete: at n decided prompts it can only
reject at certain rates. The exact test takes the largest below 5 % (n = 10: 2.1 %, 50: 3.3 %,
60: 2.7 %, 200: 4.0 %), the mid-p test one near it (2.1, 6.5, 5.2 and 5.6 %).

Writes coverage.json and coverage.md, and prints the table. Ten minutes on one core.
"""

import argparse
import json
import pathlib
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from dmpo_jax.evaluation.statistics import compare, correct


class Design(NamedTuple):
    """prompts x images evaluations of correlation icc between images of a prompt."""

    estimand: str
    prompts: int
    images: int
    icc: float

    def __str__(self) -> str:
        return f"{self.estimand}, {self.prompts} x {self.images}, ICC {self.icc:g}"


DESIGNS = (
    Design("like_these", 200, 1, 0.0),
    Design("like_these", 100, 4, 0.3),
    Design("like_these", 50, 1, 0.0),
    Design("like_these", 10, 40, 0.1),
    Design("these", 10, 40, 0.1),
    Design("these", 50, 4, 0.3),
    Design("these", 100, 2, 0.3),
)
WIN_RATES = (0.35, 0.5, 0.65, 0.8)
ITSELF = tuple(
    Design("like_these", *size, 0.0) for size in ((200, 1), (100, 4), (50, 1), (30, 2), (10, 40))
) + tuple(Design("these", *size, 0.0) for size in ((10, 40), (100, 2)))


def draw(
    design: Design, win_rate: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """One evaluation: scores of base and policy, prompts [N], and the true win rate."""
    mu, (between, within) = norm.ppf(win_rate), np.sqrt([design.icc, 1 - design.icc])
    own = mu + between * rng.normal(size=design.prompts)
    difference = own[:, None] + within * rng.normal(size=(design.prompts, design.images))
    base = rng.normal(size=(design.prompts, 1)) + rng.normal(size=difference.shape)
    prompts = np.repeat(np.arange(design.prompts), design.images)
    true = win_rate if design.estimand == "like_these" else float(norm.cdf(own / within).mean())
    return base.ravel(), (base + difference).ravel(), prompts, true


def coverage(design: Design, win_rate: float, draws: int, resamples: int) -> float:
    """Share of draws whose interval holds the true win rate."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(draws):
        base, policy, prompts, true = draw(design, win_rate, rng)
        found = compare(base, policy, prompts, estimand=design.estimand, resamples=resamples)
        low, high = found["win_rate_ci95"]
        held += low <= true <= high
    return held / draws


def named(design: Design, draws: int) -> dict[str, float]:
    """Shares of draws in which a model against itself has a winner, and in which p < 0.05."""
    rng = np.random.default_rng(2)
    counts = dict.fromkeys(("winner", "p_value", "p_wilcoxon"), 0)
    for _ in range(draws):
        base, policy, prompts, _ = draw(design, 0.5, rng)
        (found,) = correct([compare(base, policy, prompts, estimand=design.estimand, resamples=2)])
        counts["winner"] += found["winner"] is not None
        for name in ("p_value", "p_wilcoxon"):
            counts[name] += found[name] < 0.05
    return {name: count / draws for name, count in counts.items()}


def table(found: dict) -> str:
    """The Markdown of coverage.json."""
    lines = [
        f"Share of {found['draws']:,} draws whose 95 % interval holds the true win rate:",
        "",
        "| prompts x images | " + " | ".join(f"{rate:g}" for rate in WIN_RATES) + " |",
        "|---" * (1 + len(WIN_RATES)) + "|",
    ]
    for name, rates in found["coverage"].items():
        lines.append(f"| {name} | " + " | ".join(f"{held:.3f}" for held in rates.values()) + " |")
    lines += [
        "",
        f"A model against itself, share of {10 * found['draws']:,} draws:",
        "",
        "| prompts x images | a winner is named | sign test, p < .05 | signed-rank, p < .05 |",
        "|---|---|---|---|",
    ]
    for name, shares in found["itself"].items():
        lines.append(
            f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares.values()) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1999)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    args = parser.parse_args()
    found = {
        "draws": args.draws,
        "resamples": args.resamples,
        "coverage": {
            str(design): {
                str(rate): coverage(design, rate, args.draws, args.resamples) for rate in WIN_RATES
            }
            for design in DESIGNS
        },
        "itself": {str(design): named(design, 10 * args.draws) for design in ITSELF},
    }
    (args.out / "coverage.json").write_text(json.dumps(found, indent=2) + "\n")
    (args.out / "coverage.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()

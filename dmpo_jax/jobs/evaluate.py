"""Two models against each other: same prompts, same seeds, each judge's win rate."""

import html
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.models import parameters
from dmpo_jax.parallel import mesh
from dmpo_jax.sampling.images import image_grid, save_png
from dmpo_jax.sampling.sampler import make_sampler
from dmpo_jax.scoring import digits as scorers

FIRST_SEED = 2**31  # above every seed that collect gives out


def evaluate(
    *,
    a: str,
    b: str,
    prompts: Sequence[str],
    judges: Sequence[str],
    seeds: int,
    out: epath.PathLike,
    variant: str | None = None,
    seed: int = 0,
    steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int = 8,
    columns: int = 8,
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """Is `b` (the tuned model) better than `a` (the base)? Writes `out/result.json` and
    `out/samples/before_after.png`, and both on a page, `out/report.html`.

    Args:
        seeds: images of each model that every judge sees; prompts take turns.
        columns: images a row in the picture; a row of `a` above one of `b` a prompt.

    Returns:
        What result.json holds: a judge's win rate is the share of seeds where b's image
        scores above a's (equal scores count half), with a 95 % bootstrap interval over
        seeds; `score_base` and `score_policy` are the mean scores of a and b.
    """
    score = {name: scorers.get_scorer(name) for name in judges}
    pipeline = diffusers_io.load_pipeline(a, variant=variant, dtype=dtype)
    base = diffusers_io.load_unet(pipeline.folder, variant=variant, dtype=dtype)
    policy = diffusers_io.load_unet(b, dtype=dtype)
    sampler = make_sampler(
        pipeline, base, steps=steps, guidance_scale=guidance_scale, batch_size=batch_size
    )
    asked = [prompts[i % len(prompts)] for i in range(seeds)]
    numbers = [FIRST_SEED + seed * 2**20 + i for i in range(seeds)]
    everywhere = mesh.replicated(mesh.make_mesh())
    images = {}
    for side, unet in (("base", base), ("policy", policy)):
        params = jax.device_put(parameters.split(unet)[1], everywhere)
        images[side] = sampler(params, asked, numbers, f"evaluating {side}")
    result: dict[str, Any] = {
        "judges": {
            name: compare(judge(images["base"], asked), judge(images["policy"], asked))
            for name, judge in score.items()
        },
        "seeds": seeds,
        "base": str(a),
        "policy": str(b),
        "sampler": {"name": sampler.name, "steps": steps, "guidance_scale": guidance_scale},
    }
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    picture = before_after(images["base"], images["policy"], asked, columns)
    save_png(out / "samples" / "before_after.png", picture)
    (out / "report.html").write_text(report(result))
    storage.write_json(out / "result.json", result)
    return result


def compare(base: np.ndarray, policy: np.ndarray, *, resamples: int = 2000) -> dict[str, Any]:
    """Win rate of policy over base from paired scores `[N]`, with a bootstrap interval."""
    wins = np.where(policy > base, 1.0, np.where(policy == base, 0.5, 0.0))
    rows = np.random.default_rng(0).integers(0, len(wins), (resamples, len(wins)))
    low, high = np.percentile(wins[rows].mean(1), [2.5, 97.5])
    return {
        "win_rate": float(wins.mean()),
        "win_rate_ci95": [float(low), float(high)],
        "score_base": float(base.mean()),
        "score_policy": float(policy.mean()),
    }


def before_after(base: np.ndarray, policy: np.ndarray, prompts: Sequence[str], columns: int):
    """A picture: for each prompt a row of the base's images above the policy's, same seeds."""
    rows, labels = [], []
    for prompt in dict.fromkeys(prompts):
        held = [i for i, p in enumerate(prompts) if p == prompt][:columns]
        if len(held) < columns:
            continue
        rows += [base[held], policy[held]]
        labels += [f"{prompt}: before", "after"]
    if not rows:  # fewer seeds than a row holds: one row of all
        rows, labels, columns = [base, policy], ["before", "after"], len(base)
    return image_grid(np.concatenate(rows), columns, labels=labels, scale=2)


def report(result: dict[str, Any]) -> str:
    """The result as an HTML page; the picture is the one beside it."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{j['win_rate']:.1%}</td>"
        f"<td>{j['win_rate_ci95'][0]:.1%} to {j['win_rate_ci95'][1]:.1%}</td>"
        f"<td>{j['score_base']:.3f}</td><td>{j['score_policy']:.3f}</td></tr>"
        for name, j in result["judges"].items()
    )
    sampler = result["sampler"]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Base against tuned</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem }}
code {{ overflow-wrap: anywhere }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse }}
td, th {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8886 }}
td:first-child, th:first-child {{ text-align: left; padding-left: 0 }}
img {{ max-width: 100% }}
h1 {{ font-size: 1.6rem; line-height: 1.25 }}
@media (max-width: 32rem) {{ table {{ font-size: .8rem }} td, th {{ padding: .3rem .25rem }} }}
</style>
<h1>Base against tuned</h1>
<p>Base: <code>{html.escape(result["base"])}</code><br>
Tuned: <code>{html.escape(result["policy"])}</code></p>
<div><table><tr><th>judge</th><th>win rate</th><th>95 % interval</th><th>base scores</th>
<th>tuned scores</th></tr>{rows}</table></div>
<p>{result["seeds"]} held-out seeds, the same for both; {sampler["name"]}, {sampler["steps"]} steps,
guidance {sampler["guidance_scale"]}. A win: the tuned model's image scores higher; equal scores
count half. Above 50 % the judge prefers the tuned model.</p>
<img src="samples/before_after.png" alt="rows of images, base above tuned, same seeds">
</html>
"""


def summary(result: dict[str, Any]) -> str:
    """A line a judge, for people."""
    lines = []
    for name, judged in result["judges"].items():
        low, high = judged["win_rate_ci95"]
        lines.append(
            f"{name}: win rate {judged['win_rate']:.1%} [{low:.1%}, {high:.1%}], "
            f"score {judged['score_base']:.3f} -> {judged['score_policy']:.3f}"
        )
    return "\n".join(lines)

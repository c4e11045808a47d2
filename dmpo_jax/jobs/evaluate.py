"""Compares two models: same prompts, same seeds, each judge's win rate."""

from typing import Any

from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.config import arguments
from dmpo_jax.config.configs import Config
from dmpo_jax.data.prompt_files import Prompt, load_texts
from dmpo_jax.evaluation.judging import Judged, judge
from dmpo_jax.evaluation.page import before_after, render, rows_shown, summary
from dmpo_jax.evaluation.statistics import compare
from dmpo_jax.export.record import describe
from dmpo_jax.parallel import processes
from dmpo_jax.sampling.given import check_given
from dmpo_jax.sampling.images import save_png
from dmpo_jax.sampling.sampler import load_params, open_sampler
from dmpo_jax.sampling.seeds import evaluated_seeds
from dmpo_jax.scoring import Scorer, make_scorer, rehearse

COLUMNS = 8  # images per row of the picture


@processes.writes_out
def evaluate(
    config: Config,
    *,
    a: epath.PathLike,
    b: epath.PathLike,
    prompts: epath.PathLike | None = None,
    out: epath.PathLike,
) -> dict[str, Any]:
    """Compares `b` (the tuned model) with `a` (the base).

    Writes `out/result.json`, `out/samples/before_after.png`, and `out/report.html`, a page that
    shows both. model.vae decodes the images of both models.

    Args:
        a, b: pipeline folders; model.variant applies to the weight files of `a`.
        prompts: a file of prompts, one per line; by default collect.prompts or sample.prompts.

    Returns:
        The content of result.json; `compare` documents the entry of a judge.

    Raises:
        ValueError: a judge is unknown or cannot judge a prompt, or a model is missing or
            incomplete; raised before sampling.
    """
    texts, judges = check(config, prompts, a)
    diffusers_io.load_model(b, abstract=True)
    export = describe(b)
    how = arguments.pipeline(config)
    sampler, params = open_sampler(a, **how, **arguments.sampling(config))
    asked = [texts[i % len(texts)] for i in range(config.evaluate.seeds)]
    seeds = evaluated_seeds(config.seed, len(asked))
    for scorer in judges.values():
        rehearse(scorer, sampler.size, asked[: sampler.batch_size])
    rows = rows_shown(asked, COLUMNS)
    shown = {i for row in rows.values() for i in row}

    def judged(params: Any, side: str) -> Judged:
        return judge(
            sampler.batches(params, asked, seeds, f"evaluating {side}"), asked, judges, shown
        )

    base = judged(params, "base")
    del params  # holds one model's parameters at a time
    policy = judged(load_params(b, variant=None, dtype=how["dtype"]), "policy")
    result = {
        "judges": {name: compare(base.scores[name], policy.scores[name]) for name in judges},
        "seeds": len(asked),
        "base": str(a),
        "policy": str(b),
        "export": export,
        "sampler": {
            "name": sampler.name,
            "scheduler": sampler.pipeline.sampling.scheduler,
            "steps": config.sample.steps,
            "guidance_scale": config.sample.guidance_scale,
        },
    }
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "samples" / "before_after.png"
    save_png(picture, before_after(base.kept, policy.kept, rows))
    storage.write_bytes(out / "report.html", render(result).encode())
    storage.write_json(out / "result.json", result)
    print(summary(result))
    print(f"before and after: {picture}\nthe report: {out / 'report.html'}")
    return result


def check(
    config: Config, prompts: epath.PathLike | None = None, a: epath.PathLike | None = None
) -> tuple[list[str], dict[str, Scorer]]:
    """Returns the prompts and the judges; ValueError if they do not fit each other or the model.

    a: the base; by default model.folder.
    """
    names = config.evaluate.judges or (config.collect.scorer,)
    judges = {name: make_scorer(name) for name in names}
    texts = load_texts(prompts or config.collect.prompts or config.sample.prompts)
    for scorer in judges.values():
        scorer.check(texts)
    _, family = diffusers_io.load_family(a or config.model.folder)
    check_given([Prompt(text) for text in texts], family.given)
    return texts, judges

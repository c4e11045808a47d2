"""Compares models: same prompts, same seeds, each scorer's win rate with its interval."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import arguments
from dmpo_jax.config.configs import Config
from dmpo_jax.config.protocols import with_protocol
from dmpo_jax.data.prompt_files import Prompt, load_prompts
from dmpo_jax.errors import UserError
from dmpo_jax.evaluation import result as results
from dmpo_jax.evaluation.drawing import Drawer, ask
from dmpo_jax.evaluation.given_scores import GivenScores, load_scores
from dmpo_jax.evaluation.judging import judge
from dmpo_jax.evaluation.models import Model, check_model, list_models
from dmpo_jax.parallel import processes
from dmpo_jax.sampling.given import check_given
from dmpo_jax.scoring import Scorer, describe_scorers, make_scorers

LOG = logging.getLogger(__name__)


class Ready(NamedTuple):
    """All that an evaluation needs, checked."""

    models: list[Model]
    prompts: list[Prompt]
    each: int  # images of a prompt
    scorers: dict[str, Scorer]
    given: list[GivenScores]


@processes.writes_out
def evaluate(
    config: Config,
    *,
    a: epath.PathLike,
    b: epath.PathLike | Sequence[epath.PathLike],
    prompts: epath.PathLike | None = None,
    out: epath.PathLike,
    scores: Sequence[str] = (),
) -> dict[str, Any]:
    """Compares `b` (one or more tuned models) with `a` (the base).

    Writes `out/result.json`, `out/images.jsonl` (each image with its scores), the images in
    `out/images`, and `out/report/index.html`, a page that shows them. Resumes where it was
    killed; several processes share the work.

    Args:
        a, b: pipeline folders or folders of images, as `list_models` reads them; model.variant
            applies to the weight files of `a`.
        prompts: a file of prompts; by default collect.prompts or sample.prompts.
        scores: NAME:FILE.jsonl each, scores that another program gave to the images.

    Returns:
        The content of result.json, as `result.make_result` documents it.

    Raises:
        ValueError: a scorer is unknown or cannot judge a prompt, or a model is missing or
            incomplete; raised before drawing.
    """
    config, out = with_protocol(config), epath.Path(out)
    ready = check(config, prompts, a, b, scores)
    settings = config.evaluate
    LOG.info("%s", results.power(len(ready.prompts), settings.estimand))
    asked = ask(ready.prompts, ready.each, config.seed, settings.noise)
    drawer = Drawer(arguments.drawing(config))
    compared, about = judge(ready.models, drawer, asked, ready.scorers, ready.given, out)
    result = results.make_result(
        compared,
        ready.models,
        describe_scorers([*ready.scorers.values(), *ready.given], config.collect.scorer),
        {**arguments.protocol(config), "models": about},
        settings.estimand,
    )
    if jax.process_index() == 0:
        results.write(out, result, compared, settings.single_file)
        print(results.summary(result))
    processes.barrier(f"evaluated {out}")
    LOG.info("the page: %s", out / "report" / "index.html")
    return result


def check(
    config: Config,
    prompts: epath.PathLike | None = None,
    a: epath.PathLike | None = None,
    b: epath.PathLike | Sequence[epath.PathLike] = (),
    scores: Sequence[str] = (),
) -> Ready:
    """Returns what an evaluation needs; ValueError if its parts do not fit each other.

    a: the base; by default model.folder.
    """
    names = config.evaluate.judges
    if names is None:
        names = (config.collect.scorer,) if config.collect.scorer else ()
    scorers, given = make_scorers(names), [load_scores(spec) for spec in scores]
    asked = load_prompts(prompts or config.collect.prompts or config.sample.prompts)
    each = config.evaluate.images_per_prompt or -(-config.evaluate.seeds // len(asked))
    if config.evaluate.estimand == "these" and each < 2:
        raise UserError(
            "evaluate.estimand 'these' resamples the images of each prompt, but there is one of "
            "each: set --images_per_prompt=2 or more, or --estimand=like_these"
        )
    for scorer in scorers.values():
        scorer.check([prompt.text for prompt in asked])
    base, *others = list_models(a or config.model.folder, b)
    models = [base._replace(variant=config.model.variant or None), *others]
    for model in models:
        check_model(model, asked, each)
        if model.drawn:
            check_given(asked, diffusers_io.load_family(model.folder)[1].given)
    return Ready(models, asked, each, scorers, given)

"""Collects preference pairs: samples two images per prompt and labels them by a scorer."""

import logging

import jax
from etils import epath

from dmpo_jax.collecting.pairs import PARTS, Parts, read_scores
from dmpo_jax.config import arguments
from dmpo_jax.config.configs import Config
from dmpo_jax.data.prompt_files import Prompt, load_prompts
from dmpo_jax.data.sources import write_pick_a_pic
from dmpo_jax.diffusers_io import load_family
from dmpo_jax.parallel import processes
from dmpo_jax.sampling.given import check_given
from dmpo_jax.sampling.sampler import open_sampler
from dmpo_jax.sampling.seeds import collected_seeds
from dmpo_jax.sampling.store import Drawing, describe, draw
from dmpo_jax.scoring import Scorer, make_scorer, rehearse
from dmpo_jax.scoring.labels import Labels, described, temperature_of

LOG = logging.getLogger(__name__)


@processes.writes_out
def collect(
    config: Config, *, prompts: epath.PathLike | None = None, out: epath.PathLike
) -> epath.Path:
    """Writes `out/pairs.parquet`, in Pick-a-Pic's schema. Does nothing if it exists.

    Prompts are used in turn, with their negative prompts, images and masks; runs with different
    seeds draw different images. Resumes a run of the same settings; several processes share the
    work.

    Args:
        prompts: a file of prompts; by default collect.prompts or sample.prompts.

    Returns:
        The parquet file.

    Raises:
        ValueError: the scorer is unknown or cannot judge a prompt, a part of the model is
            missing, or another collection is unfinished there; raised before sampling.
    """
    path = epath.Path(out) / "pairs.parquet"
    if path.exists():
        LOG.info("%s is collected already: delete it to collect anew", path)
        return path
    asked, scorer = check(config, prompts)
    how = arguments.drawing(config)
    sampler, load = open_sampler(config.model.folder, **how)
    asked = [asked[i // 2 % len(asked)] for i in range(2 * config.collect.pairs)]
    rehearse(scorer, sampler.size, [prompt.text for prompt in asked[: sampler.batch_size]])
    temperature = temperature_of(scorer, config.collect.temperature)
    labels = Labels(config.collect.labels, temperature, config.collect.tie_margin, config.seed)
    about = {
        **describe(config.model.folder, sampler, how),
        "scorer": f"{scorer.name} {scorer.version}",
        "labels": [labels.kind, labels.temperature, labels.tie_margin, labels.seed],
    }
    drawing = Drawing(sampler, load, asked, collected_seeds(config.seed, len(asked)), about)
    parts = Parts(path.parent / PARTS, drawing, scorer, labels, config.model.folder)
    draw(parts.folder, drawing, parts, "collecting", even=True)
    if jax.process_index() == 0:
        write_pick_a_pic(path, parts.rows())
        parts.folder.rmtree()
        LOG.info("%s", described(*read_scores(path)))
    processes.barrier(f"collected {path}")
    LOG.info("the pairs are in %s", path)
    return path


def check(config: Config, prompts: epath.PathLike | None = None) -> tuple[list[Prompt], Scorer]:
    """Returns the prompts and the scorer; ValueError if they do not fit each other or the model."""
    scorer = make_scorer(config.collect.scorer)
    asked = load_prompts(prompts or config.collect.prompts or config.sample.prompts)
    scorer.check([prompt.text for prompt in asked])
    temperature_of(scorer, config.collect.temperature)
    check_given(asked, load_family(config.model.folder)[1].given)
    return asked, scorer

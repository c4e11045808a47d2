"""Samples images from a diffusers pipeline folder."""

import logging
from collections.abc import Sequence

from etils import epath

from dmpo_jax.config import arguments
from dmpo_jax.config.configs import Config
from dmpo_jax.data.prompt_files import Prompt, load_prompts
from dmpo_jax.diffusers_io import load_family, parse_loras
from dmpo_jax.families import Family
from dmpo_jax.parallel import processes
from dmpo_jax.sampling.gallery import draw_gallery, write_grid
from dmpo_jax.sampling.given import check_given
from dmpo_jax.sampling.sampler import open_sampler
from dmpo_jax.sampling.seeds import prompt_seeds
from dmpo_jax.sampling.store import Drawing, describe

LOG = logging.getLogger(__name__)


@processes.writes_out
def sample(
    config: Config,
    *,
    prompts: epath.PathLike,
    out: epath.PathLike,
    lora: str | Sequence[str] = (),
) -> epath.Path:
    """Writes one PNG per image, with embedded settings, and `out/grid.png`, one row per prompt.

    Also `out/images.jsonl`, a line an image. Seeds count up from the config's over all images, or
    from a prompt's own seed. Images that are there already are not drawn again; several processes
    share the work.

    Args:
        prompts: a file of prompts, as `load_prompts` reads it.
        lora: LoRA files that are merged into the model, FILE or FILE:SCALE.

    Returns:
        The folder.

    Raises:
        ValueError: a part of the model is missing, a prompt lacks the image that the model
            needs, a LoRA file is of another model, the sampler does not support a setting, or
            `out` holds other images; raised before sampling.
    """
    asked, family = check(config, prompts)
    how = arguments.drawing(config)
    loras = parse_loras(lora)
    sampler, load = open_sampler(config.model.folder, **how, loras=loras)
    settings = {
        "model": str(config.model.folder),
        "steps": config.sample.steps,
        "guidance_scale": config.sample.guidance_scale,
    }
    if family.given and family.given.optional:
        settings["image_guidance_scale"] = config.sample.image_guidance_scale
    if config.model.vae:
        settings["vae"] = config.model.vae
    if loras:
        settings["lora"] = [found.name for found in loras]
    about = describe(config.model.folder, sampler, how)
    # None without any: folders of earlier versions say nothing of them.
    about["loras"] = [found.about() for found in loras] or None
    each = config.sample.images_per_prompt
    out = epath.Path(out)
    drawing = Drawing(
        sampler,
        load,
        [prompt for prompt in asked for _ in range(each)],
        prompt_seeds(asked, each, config.seed),
        about,
    )
    names = draw_gallery(out, drawing, settings)
    grid = write_grid(out, names, [prompt.text for prompt in asked])
    LOG.info("%d images are in %s; all on one sheet: %s", len(names), out, grid)
    return out


def check(config: Config, prompts: epath.PathLike) -> tuple[list[Prompt], Family]:
    """Returns the prompts and the model's family; ValueError if they do not fit each other."""
    asked = load_prompts(prompts)
    _, family = load_family(config.model.folder)
    check_given(asked, family.given)
    return asked, family

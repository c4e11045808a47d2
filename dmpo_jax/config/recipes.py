"""Published settings by name, each with its source.

`configs/published.py:NAME` trains with one of them. Published scripts scale their learning rate:
`--scale_lr` multiplies it by pairs per device, devices and accumulation, that is by the pairs of
an update. Here it is already scaled: `optimizer.learning_rate` is the rate applied.
"""

from typing import Any, NamedTuple

from dmpo_jax.config.configs import Config, nearest
from dmpo_jax.errors import UserError

PAIRS = 2048  # per update, in all recipes


class Recipe(NamedTuple):
    """Published settings. leaves: by dotted path of the config. source: repository and file."""

    leaves: dict[str, Any]
    source: str


def scaled(rate: float, pairs: int = PAIRS) -> float:
    """Returns the rate that --scale_lr makes of `rate` for an update of `pairs` pairs."""
    return rate * pairs


def _recipe(objective: str, rate: float, source: str, more: dict[str, Any]) -> Recipe:
    leaves = {
        "objective": objective,
        "train.steps": 2000,
        "train.batch_size": PAIRS,
        "data.prompt_dropout": 0.2,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": scaled(rate),
        "optimizer.warmup_steps": 500,
        "optimizer.schedule": "constant",
        **more,
    }
    return Recipe(leaves, source)


_SDPO = "AIDC-AI/Diffusion-SDPO, scripts/train/{}.sh"
_DPO = "SalesforceAIResearch/DiffusionDPO, launchers/{}.sh"
RECIPES = {
    "sd15_dmpo": _recipe(
        "dmpo",
        1e-8,
        _SDPO.format("sd15_dmpo"),
        {"objectives.dmpo.beta": 2000.0, "objectives.dmpo.alpha": 0.01, "safeguard.mu": 0.9},
    ),
    "sd15_diffusion_dpo": _recipe(
        "diffusion_dpo", 1e-8, _DPO.format("sd15"), {"objectives.diffusion_dpo.beta": 5000.0}
    ),
    "sd15_dspo": _recipe(
        "dspo",
        1e-8,
        _SDPO.format("sd15_dspo"),
        {"objectives.dspo.beta": 0.001, "safeguard.mu": 0.2},
    ),
    "sdxl_dmpo": _recipe(
        "dmpo",
        1e-9,
        _SDPO.format("sdxl_dmpo"),
        {"objectives.dmpo.beta": 6000.0, "objectives.dmpo.alpha": 0.01, "safeguard.mu": 0.6},
    ),
    "sdxl_diffusion_dpo": _recipe(
        "diffusion_dpo",
        1e-8,
        _DPO.format("sdxl"),
        {
            "objectives.diffusion_dpo.beta": 5000.0,
            "optimizer.name": "adafactor",  # train.py's default for SDXL
            "optimizer.warmup_steps": 200,
        },
    ),
    "sdxl_diffusion_dpo_safeguarded": _recipe(
        "diffusion_dpo",
        1e-9,
        _SDPO.format("sdxl_diffusion_dpo"),
        {"objectives.diffusion_dpo.beta": 5000.0, "safeguard.mu": 0.6},
    ),
}


def apply(config: Config, name: str) -> Config:
    """Sets the leaves of a recipe; other leaves are unchanged.

    Raises:
        ValueError: unknown name; the message lists the recipes.
    """
    if name not in RECIPES:
        raise UserError(
            f"there is no published recipe {name!r}; did you mean {nearest(name, RECIPES)!r}? "
            f"There are {', '.join(RECIPES)}"
        )
    config.update_from_flattened_dict(RECIPES[name].leaves)
    return config

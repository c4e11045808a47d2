"""Published settings by name, each with its source.

`configs/published.py:NAME` trains with one of them. Published scripts scale their learning rate:
`--scale_lr` multiplies it by pairs per device, devices and accumulation, that is by the pairs of
an update. Here it is already scaled: `optimizer.learning_rate` is the rate applied.

Recipes also set what the scripts do beside the loss; docs/recipes.md lists it, and what they do
that no recipe sets.
"""

from typing import Any, NamedTuple

from dmpo_jax.config.configs import Config, nearest
from dmpo_jax.errors import UserError

PAIRS = 2048  # per update, in the recipes of DDPM models
DEVICE = 8  # of these, on a device at a time: a mean over the batch is one over them
# Attention of both streams, without SD3.5-medium's second one of the image alone.
SD3_TARGETS = tuple(
    f"attn.{name}"
    for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
)


class Recipe(NamedTuple):
    """Published settings. leaves: by dotted path of the config. source: repository and file."""

    leaves: dict[str, Any]
    source: str


def scaled(rate: float, pairs: int = PAIRS) -> float:
    """Returns the rate that --scale_lr makes of `rate` for an update of `pairs` pairs."""
    return rate * pairs


def _recipe(objective: str, rate: float, source: str, more: dict[str, Any]) -> Recipe:
    """Returns a recipe of the scripts that descend from DiffusionDPO's train.py."""
    leaves = {
        "objective": objective,
        "train.steps": 2000,
        "train.batch_size": PAIRS,
        "data.prompt_dropout": 0.2,
        "data.ties": "drop",
        "data.flip": True,
        "data.flip_each": True,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": scaled(rate),
        "optimizer.warmup_steps": 500,
        "optimizer.schedule": "constant",
        **more,
    }
    return Recipe(leaves, source)


_SDPO = "AIDC-AI/Diffusion-SDPO, scripts/train/{}.sh"
_DPO = "SalesforceAIResearch/DiffusionDPO, launchers/{}.sh"
# What the SDXL branch of their train.py adds, whatever the launcher says.
_SDXL: dict[str, Any] = {"optimizer.name": "adafactor", "data.sizes": "resolution"}


def _safeguard(mu: float) -> dict[str, Any]:
    return {"safeguard.mu": mu, "train.group": DEVICE}


SD3_LORA: dict[str, Any] = {
    "lora.rank": 32,
    "lora.alpha": 64.0,
    "lora.targets": SD3_TARGETS,
    "optimizer.learning_rate": 3e-4,
}
SD35_DMPO: dict[str, Any] = {
    "objective": "dmpo",
    "objectives.dmpo.beta": 1000.0,
    "objectives.dmpo.alpha": 0.01,
    "train.batch_size": 128,
    "optimizer.learning_rate": 5e-6,
    "optimizer.warmup_steps": 100,
    "timesteps.density": "logit_normal",
    "data.moments": "mean",  # half the bytes of 16 channels
}
RECIPES = {
    "sd15_dmpo": _recipe(
        "dmpo",
        1e-8,
        _SDPO.format("sd15_dmpo"),
        {"objectives.dmpo.beta": 2000.0, "objectives.dmpo.alpha": 0.01, **_safeguard(0.9)},
    ),
    "sd15_diffusion_dpo": _recipe(
        "diffusion_dpo", 1e-8, _DPO.format("sd15"), {"objectives.diffusion_dpo.beta": 5000.0}
    ),
    "sd15_dspo": _recipe(
        "dspo",
        1e-8,
        _SDPO.format("sd15_dspo"),
        {"objectives.dspo.beta": 0.001, **_safeguard(0.2)},
    ),
    "sdxl_dmpo": _recipe(
        "dmpo",
        1e-9,
        _SDPO.format("sdxl_dmpo"),
        {
            "objectives.dmpo.beta": 6000.0,
            "objectives.dmpo.alpha": 0.01,
            **_safeguard(0.6),
            **_SDXL,
        },
    ),
    "sdxl_diffusion_dpo": _recipe(
        "diffusion_dpo",
        1e-8,
        _DPO.format("sdxl"),
        {
            "objectives.diffusion_dpo.beta": 5000.0,
            "optimizer.warmup_steps": 200,
            **_SDXL,
        },
    ),
    "sdxl_diffusion_dpo_safeguarded": _recipe(
        "diffusion_dpo",
        1e-9,
        _SDPO.format("sdxl_diffusion_dpo"),
        {"objectives.diffusion_dpo.beta": 5000.0, **_safeguard(0.6), **_SDXL},
    ),
    "sd15_diffusion_dpo_safeguarded": _recipe(
        "diffusion_dpo",
        1e-8,
        _SDPO.format("sd15_diffusion_dpo"),
        {"objectives.diffusion_dpo.beta": 5000.0, **_safeguard(0.9)},
    ),
    "sdxl_dspo": _recipe(
        "dspo_sdxl",
        1e-9,
        _SDPO.format("sdxl_dspo"),
        {"objectives.dspo_sdxl.beta": 5000.0, **_safeguard(0.6), **_SDXL},
    ),
    "sd35_medium_diffusion_dpo": Recipe(
        {
            "objective": "diffusion_dpo",
            "objectives.diffusion_dpo.beta": 100.0,
            **SD3_LORA,
            "train.batch_size": 192,  # 24 a GPU, on 8
            "train.ema_decay": 0.987,  # 0.9 every 8 updates
            "data.resolution": 512,
            "data.prompt_dropout": 0.0,
            "optimizer.weight_decay": 1e-4,
            "optimizer.warmup_steps": 0,
            "timesteps.density": "logit_normal",
        },
        "yifan123/flow_grpo, scripts/train_sd3_dpo.py and config/dpo.py, on pairs that it draws",
    ),
    "sd3_medium_diffusion_dpo": Recipe(
        {
            "objective": "diffusion_dpo",
            "objectives.diffusion_dpo.beta": 5000.0,
            "train.batch_size": 128,
            "train.steps": 3200,
            "optimizer.learning_rate": 5e-6,
            "optimizer.warmup_steps": 100,
        },
        "Whynot0101/Linear-DPO, run_sd3 launchers, on HPDv3 (another launcher has beta 1000)",
    ),
    "sd35_medium_dmpo": Recipe(
        SD35_DMPO,
        "none: a starting point of this package, with the rate, batch and warmup of "
        "Whynot0101/Linear-DPO and a beta between its 5000 and the 100 of yifan123/flow_grpo",
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

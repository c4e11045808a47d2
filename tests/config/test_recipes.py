"""Tests for dmpo_jax/config/recipes.py and configs/published.py."""

import importlib.util
import pathlib

import pytest

from dmpo_jax.config import checks as config_checks
from dmpo_jax.config import configs, recipes

ROOT = pathlib.Path(__file__).parents[2]


def published():
    spec = importlib.util.spec_from_file_location("published", ROOT / "configs" / "published.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_a_config_that_can_run(name):
    config = published().get_config(name)
    config_checks.validate(config)
    flat = configs.flatten(config)
    for path, value in recipes.RECIPES[name].leaves.items():
        assert flat[path] == value, path
    assert "/" in recipes.RECIPES[name].source
    assert name in published().__doc__


def test_rates_are_those_of_a_whole_update():
    rates = {n: r.leaves["optimizer.learning_rate"] for n, r in recipes.RECIPES.items()}
    assert rates["sd15_dmpo"] == pytest.approx(2.048e-5)
    assert rates["sdxl_dmpo"] == pytest.approx(2.048e-6)
    assert recipes.scaled(1e-8, 64) == pytest.approx(6.4e-7)


# Whatever the launcher says, their train.py drops Pick-a-Pic's ties and flips each image by itself
# (--no_hflip is in none of them); its SDXL branch tells the UNet (h, w, 0, 0, h, w).
SWITCHES = {"data.ties": "drop", "data.flip": True, "data.flip_each": True}
OF_SDXL = {"data.sizes": "resolution", "optimizer.name": "adafactor"}
# beta, alpha, rate of --scale_lr, mu, optimizer in effect: read in AIDC-AI/Diffusion-SDPO's
# scripts/train/*.sh and train.py, which takes Adafactor for every SDXL run.
LAUNCHERS = {
    "sd15_dmpo": ("dmpo", 2000, 0.01, 1e-8, 0.9, "adamw"),
    "sdxl_dmpo": ("dmpo", 6000, 0.01, 1e-9, 0.6, "adafactor"),
    "sd15_diffusion_dpo_safeguarded": ("diffusion_dpo", 5000, None, 1e-8, 0.9, "adamw"),
    "sdxl_diffusion_dpo_safeguarded": ("diffusion_dpo", 5000, None, 1e-9, 0.6, "adafactor"),
    "sd15_dspo": ("dspo", 0.001, None, 1e-8, 0.2, "adamw"),
    "sdxl_dspo": ("dspo_sdxl", 5000, None, 1e-9, 0.6, "adafactor"),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_recipes_are_what_their_launchers_do(name):
    objective, beta, alpha, rate, mu, optimizer = LAUNCHERS[name]
    config = published().get_config(name)
    chosen = config.objectives[objective].to_dict()
    assert (config.objective, chosen["beta"], chosen.get("alpha")) == (objective, beta, alpha)
    assert config.optimizer.learning_rate == pytest.approx(2048 * rate)
    assert (config.safeguard.mu, config.optimizer.name) == (mu, optimizer)
    # And what all of them have in common.
    assert (config.train.batch_size, config.train.steps) == (2048, 2000)
    assert (config.optimizer.warmup_steps, config.optimizer.schedule) == (500, "constant")
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.01, 1.0)
    assert config.data.prompt_dropout == 0.2
    flat = configs.flatten(config)
    switches = SWITCHES | (OF_SDXL if name.startswith("sdxl") else {"data.sizes": "own"})
    assert {path: flat[path] for path in switches} == switches
    assert config.train.group == 8  # --train_batch_size: lambda is one over a device's pairs


@pytest.mark.parametrize(
    ("name", "warmup", "of_model"),
    [
        ("sd15_diffusion_dpo", 500, {"data.sizes": "own", "optimizer.name": "adamw"}),
        ("sdxl_diffusion_dpo", 200, OF_SDXL),
    ],
)
def test_the_first_launchers_have_the_same_switches(name, warmup, of_model):
    """SalesforceAIResearch/DiffusionDPO, launchers/sd15.sh and sdxl.sh."""
    flat = configs.flatten(published().get_config(name))
    switches = SWITCHES | of_model | {"train.group": None, "safeguard.mu": None}
    assert {path: flat[path] for path in switches} == switches
    assert (flat["objectives.diffusion_dpo.beta"], flat["optimizer.warmup_steps"]) == (5000, warmup)
    assert flat["optimizer.learning_rate"] == pytest.approx(2.048e-5)
    assert flat["data.prompt_dropout"] == 0.2


def test_what_is_unknown_is_refused():
    with pytest.raises(
        ValueError, match=r"no published recipe 'sd15'; did you mean 'sd15_dmpo'\? There are"
    ):
        recipes.apply(configs.defaults(), "sd15")

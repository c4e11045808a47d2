"""Converts a config to the plain arguments of training: `StepSettings` and `LoopSettings`."""

from typing import Any

from dmpo_jax.config import arguments, checks
from dmpo_jax.config.configs import Config
from dmpo_jax.models.execution import Execution
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.training.build import Rate, StepSettings
from dmpo_jax.training.loop import LoopSettings

OPTIMIZER = ("name", "b1", "b2", "eps", "weight_decay", "clip_norm")


def read_step(config: Config) -> StepSettings:
    """Returns the settings of a config's training step."""
    optimizer = config.optimizer
    return StepSettings(
        objective=OBJECTIVES[config.objective],
        hyperparameters=config.objectives[config.objective].to_dict(),
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        compute_dtype=config.model.compute_dtype,
        execution=Execution(config.model.attention, config.model.remat, config.model.scan),
        lora=arguments.adapters(config),
        ema_decay=config.train.ema_decay,
        rate=Rate(
            peak=optimizer.learning_rate,
            warmup_steps=optimizer.warmup_steps,
            total_steps=config.train.steps,
            schedule=optimizer.schedule,
        ),
        optimizer={name: optimizer[name] for name in OPTIMIZER},
        timesteps=config.timesteps.to_dict(),
        safeguard=config.safeguard.mu,
    )


def read_loop(config: Config) -> LoopSettings:
    """Returns the settings of a config's training loop."""
    return LoopSettings(
        steps=config.train.steps,
        every=config.log.every,
        skip_limit=config.train.skip_limit,
        hang_limit=config.train.hang_limit,
        profile=checks.parse_profile(config.profile),
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        title=config.objective,
    )


def mesh_axes(config: Config) -> dict[str, Any]:
    """Arguments of `mesh.make_mesh`."""
    return {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}


def data_settings(config: Config) -> dict[str, Any]:
    """Arguments of `build.make_batches` that a config sets."""
    names = ("prompt_dropout", "flip", "num_threads", "prefetch")
    return {"seed": config.seed, **{name: config.data[name] for name in names}}

"""The scan that all samplers share, and the record that declares a sampler."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Shaped

from dmpo_jax.diffusion.noise import split_prediction
from dmpo_jax.errors import UserError

Latents = Float[Array, "N h w C"]
Times = Shaped[Array, " N"]  # int32, or float32 if a level lies between two timesteps
Predict = Callable[[Latents, Times], Latents]
Config = Mapping[str, Any]  # of scheduler_config.json
OFF = (False, None)


class Table(NamedTuple):
    """Levels of the S steps, one per row: the model's inputs, and the levels after the step."""

    timesteps: Shaped[np.ndarray, " S"]
    signal: Float32[np.ndarray, " S"]
    noise: Float32[np.ndarray, " S"]
    next_signal: Float32[np.ndarray, " S"]
    next_noise: Float32[np.ndarray, " S"]
    correction: Float32[np.ndarray, " S"]


class Solver(NamedTuple):
    """A sampler and the diffusers schedulers whose configs it can follow.

    solve: `(predict, latents, *, schedule, num_steps, **settings) -> latents`. The defaults of
        its settings are those of its scheduler class, and are declared nowhere else.
    scheduler: the class that it implements. stands_in: other classes that it may replace.
    noise: kind of the noise tables that it supports, "ddpm" or "flow".
    only: config -> keys that change what the class does and are supported at these values
        alone, the class's own default first.
    given: settings that the pipeline passes, which scheduler_config.json does not hold.
    strict: refuse unknown keys, if they are set.
    """

    solve: Callable[..., Latents]
    scheduler: str
    noise: str = "ddpm"
    stands_in: tuple[str, ...] = ()
    only: Callable[[Config], Mapping[str, tuple[Any, ...]]] = lambda config: {}
    given: frozenset[str] = frozenset()
    strict: bool = False

    def __call__(self, predict: Predict, latents: Latents, **settings: Any) -> Latents:
        return self.solve(predict, latents, **settings)

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings that scheduler_config.json may change, with the class's own values."""
        parameters = inspect.signature(self.solve).parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if p.default is not p.empty and p.name not in self.given
        }

    def read(self, config: Config) -> dict[str, Any]:
        """Reads the settings of a scheduler_config.json.

        Raises:
            ValueError: naming the key whose value the sampler does not support.
        """
        only, defaults = self.only(config), self.defaults
        unknown = {
            key: OFF[::-1]
            for key in config
            if self.strict and key not in defaults and key not in only and not key.startswith("_")
        }
        for key, supported in {**only, **unknown}.items():
            value = config.get(key, supported[0])
            if value not in supported:
                raise UserError(f"{key}={value!r}, but {self.name} supports only {supported[0]!r}")
        return {key: config.get(key, default) for key, default in defaults.items()}

    @property
    def name(self) -> str:
        return self.solve.__name__


def walk(
    predict: Predict,
    latents: Latents,
    table: Table,
    prediction_type: str,
    clip: float | int | None = None,
) -> Latents:
    corrected = bool(table.correction.any())

    def step(carry, row):
        x, before = carry
        at = jnp.full(len(x), row.timesteps)
        sample, epsilon = split_prediction(
            predict(x, at), x, row.signal, row.noise, prediction_type
        )
        if clip is not None:  # epsilon stays as predicted, as in diffusers
            sample = jnp.clip(sample, -clip, clip)
        x = row.next_signal * sample + row.next_noise * epsilon
        if corrected:
            x = x + row.correction * (sample - before)
        return (x, sample if corrected else None), None

    latents = latents.astype(jnp.float32)
    start = latents, jnp.zeros_like(latents) if corrected else None
    return jax.lax.scan(step, start, table)[0][0]

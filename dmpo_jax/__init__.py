"""Preference alignment for latent diffusion models in JAX.

    import dmpo_jax as dj

    config = dj.load_config("sdxl_dmpo")
    config.model.folder = "stabilityai/stable-diffusion-xl-base-1.0"
    dj.encode(config, source="pickapic:PATH", out="encoded")
    config.data.encoded = "encoded"
    dj.train(config, "run")
    dj.sample(model="run/export", prompts="prompts.txt", out="images", steps=30)

The functions are the commands; their keywords have the names and defaults of the flags.
`help(dj.sample)` lists them. They are imported lazily: importing this package imports no JAX.
"""

from typing import Any

__version__ = "0.1.0"

_COMMANDS = ("calibrate", "collect", "convert", "encode", "evaluate", "plan", "sample", "verify")
_OTHERS = {
    "defaults": ("dmpo_jax.config.configs", "defaults"),
    "load_config": ("dmpo_jax.config.files", "load_config"),
    "train": ("dmpo_jax.python", "train"),
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _COMMANDS:
        return importlib.import_module("dmpo_jax.python").python_function(name)
    if name in _OTHERS:
        module, attribute = _OTHERS[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_COMMANDS, *_OTHERS])

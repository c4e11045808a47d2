"""Protocols by name: the settings under which published scores were measured."""

from typing import Any, NamedTuple


class Protocol(NamedTuple):
    """Settings of an evaluation. leaves: by dotted path of the config. source: of the settings."""

    leaves: dict[str, Any]
    source: str


PROTOCOLS = {
    "default": Protocol({}, "the config's: standard guidance, a noise of its own for each image"),
    # One noise for all prompts makes the images of different prompts alike in their layout.
    "sdpo": Protocol(
        {
            "sample.sampler": "euler",
            "sample.steps": 50,
            "sample.guidance_scale": 8.5,
            "sample.vae_dtype": "float32",
            "evaluate.noise": "shared",
        },
        "AIDC-AI/Diffusion-SDPO: its guidance 7.5 counts from 0, here 1 is none",
    ),
}

ESTIMANDS = {
    "like_these": "Intervals are for prompts like these: other prompts of their kind.",
    "these": "Intervals are for these prompts: other seeds of the same prompts.",
}

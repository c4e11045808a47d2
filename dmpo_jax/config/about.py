"""Facts that the page of a run shows beside its curves: settings, prompts, the next commands."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from dmpo_jax import storage
from dmpo_jax.config import configs
from dmpo_jax.config.configs import Config
from dmpo_jax.training.run_page import About, Next, Setting

# Options that change how images look: `sample` and `evaluate` take them by their last name.
DRAWING = (
    *("sample.sampler", "sample.steps", "sample.guidance_scale", "sample.negative_prompt"),
    *("sample.image_guidance_scale", "sample.height", "sample.width", "sample.vae_dtype"),
    "model.vae",
)


def about_run(config: Config, workdir: epath.PathLike, prompts: Sequence[str]) -> About:
    """Returns the facts of a run. prompts: of its image grids."""
    return About(
        title=storage.absolute(workdir).name,
        subtitle=f"{config.objective} on {config.model.folder}",
        settings=tuple(changed_settings(config)),
        prompts=tuple(prompts),
        following=tuple(next_commands(config, storage.absolute(workdir))),
        compared="evaluate" in config.jobs,
    )


def changed_settings(config: Config) -> Iterator[Setting]:
    """Yields the options that differ from their defaults, those of other objectives apart."""
    known = configs.declared()
    for path, value in configs.flatten(config).items():
        section, _, rest = path.partition(".")
        if section == "objectives" and not rest.startswith(f"{config.objective}."):
            continue
        default = known[path].default if path in known else None
        if value != default:
            yield Setting(path, _shown(value), _shown(default))


def next_commands(config: Config, workdir: epath.PathLike) -> Iterator[Next]:
    """Yields the commands that may follow a run, with its paths.

    Words in capitals stand for what the config does not say.
    """
    out = epath.Path(workdir)
    base, tuned = config.model.folder or "BASE", out / "export"
    prompts = config.collect.prompts or config.sample.prompts or "FILE"
    judges = config.evaluate.judges or (config.collect.scorer or "pickscore:FOLDER",)
    drawing = _flags(config, DRAWING)
    of_base = _flags(config, ("model.variant",))  # an export has plain names
    if "evaluate" not in config.jobs:
        yield Next(
            "Compare it with the base, on prompts that it was not trained on",
            _command(
                *("evaluate", f"--a={base}", f"--b={tuned}", f"--prompts={prompts}"),
                *(f"--judges={','.join(judges)}", f"--out={out / 'evaluation'}", *drawing),
                *of_base,
            ),
        )
    yield Next(
        "Draw images with the tuned model",
        _command(
            *("sample", f"--model={tuned}", f"--prompts={prompts}", f"--out={out / 'drawn'}"),
            *drawing,
        ),
    )
    if config.lora.rank:
        yield Next(
            "Load the adapters in PyTorch",
            f"pipeline.load_lora_weights({str(out / 'lora')!r})",
        )
    yield Next(
        "Make a diffusers folder or a LoRA file of the newest checkpoint (--step=N: of another)",
        _command("convert", f"--checkpoint={out}", f"--out={out / 'converted'}"),
    )
    yield Next(
        "List what would be published on the Hugging Face hub; without --push_dry_run, publish it",
        _command(
            *("convert", f"--checkpoint={out}", f"--out={out / 'published'}"),
            *("--push=ORG/NAME", "--push_dry_run"),
        ),
    )


def _flags(config: Config, paths: Sequence[str]) -> list[str]:
    """Returns the flags of those options that differ from their defaults."""
    flat, known = configs.flatten(config), configs.declared()
    changed = [path for path in paths if flat[path] not in (None, known[path].default)]
    return [f"--{path.rpartition('.')[2]}={flat[path]}" for path in changed]


def _command(*words: str) -> str:
    return shlex.join(["dmpo-jax", *words])


def _shown(value: Any) -> str:
    """Returns an option's value as its flag takes it; "" if it is unset."""
    if value is None:
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

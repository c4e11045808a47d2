"""Converts a config to the plain arguments of training: `StepSettings`, `LoopSettings`, hooks."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.config import arguments, checks, configs
from dmpo_jax.config.about import about_run
from dmpo_jax.config.configs import Config
from dmpo_jax.data.batches.mixture import Mixture, open_mixture
from dmpo_jax.data.encoded.records import EncodedPairs, load_meta, open_pairs
from dmpo_jax.data.prompt_files import load_texts
from dmpo_jax.errors import UserError
from dmpo_jax.families import Family, family_named
from dmpo_jax.families.family import Embedded
from dmpo_jax.models.execution import Execution
from dmpo_jax.objectives import OBJECTIVES, Anchor
from dmpo_jax.parallel import meshes
from dmpo_jax.sampling.grids import embed_texts, make_draw, why_no_grids
from dmpo_jax.sampling.sampler import make_sampler
from dmpo_jax.toy.debug import write_debug_files
from dmpo_jax.training import starts
from dmpo_jax.training.build import Beginning, Rate, StepSettings, TrainingStep
from dmpo_jax.training.hooks import Draw
from dmpo_jax.training.loop import LoopSettings
from dmpo_jax.training.step import Moving

LOG = logging.getLogger(__name__)

OPTIMIZER = ("name", "b1", "b2", "eps", "weight_decay", "clip_norm")


def read_step(config: Config) -> StepSettings:
    """Returns the settings of a config's training step, uncut if it is yet to be chosen how."""
    optimizer = config.optimizer
    return StepSettings(
        objective=OBJECTIVES[config.objective],
        hyperparameters=config.objectives[config.objective].to_dict(),
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation or 1,
        group=config.train.group,
        sizes=config.data.sizes,
        compute_dtype=config.model.compute_dtype,
        frozen_dtype=config.model.frozen_dtype,
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
        anchor=Anchor(**config.anchor.to_dict()) if config.anchor.kind else None,
        moving=moving(config),
    )


def moving(config: Config) -> Moving | None:
    """Returns how a config's reference follows the policy; None if it is fixed."""
    decay = config.reference.decay
    return None if decay is None else Moving(decay, config.reference.every)


def read_loop(
    config: Config, workdir: epath.PathLike = "", prompts: Sequence[str] = ()
) -> LoopSettings:
    """Returns the settings of a config's training loop.

    workdir, prompts: of the run's image grids; for its page, which it has none without.
    """
    paged = workdir and config.log.page
    return LoopSettings(
        steps=config.train.steps,
        every=config.log.every,
        skip_limit=config.train.skip_limit,
        hang_limit=config.train.hang_limit,
        stop_on_alarm=config.train.stop_on_alarm,
        profile=checks.parse_profile(config.profile),
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        title=config.objective,
        page=about_run(config, workdir, prompts) if paged else None,
    )


def mesh_axes(config: Config) -> dict[str, Any]:
    """Arguments of `mesh.make_mesh`."""
    return {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}


def load_model(
    config: Config, settings: StepSettings, family: Family, devices: jax.sharding.Mesh
) -> Any:
    """Loads the model that a config trains, sharded, what is frozen as it is held."""
    return _load(arguments.trained(config), settings, family, devices, frozen=bool(settings.lora))


def read_beginning(
    config: Config,
    settings: StepSettings,
    family: Family,
    devices: jax.sharding.Mesh,
    model: Any,
) -> Beginning:
    """Reads the adapters that a config's run begins with, and its reference, if it names any.

    model: loaded from the config's start.
    """

    def load(start: diffusers_io.Start) -> Any:
        # A LoRA file is folded in before anything is rounded.
        return _load(start, settings, family, devices, frozen=start.lora is None)

    return starts.read_beginning(*arguments.starts(config), settings.lora, model, load)


def _load(
    source: Any, settings: StepSettings, family: Family, devices: jax.sharding.Mesh, *, frozen: bool
) -> Any:
    """Loads the model of a `Start` or a `Trained`: in float32, or as what is frozen is held."""
    how: dict[str, Any] = {"param_dtype": "float32"}
    if frozen:
        held = settings.holding(family)
        how = {"param_dtype": held.read_as, "held": held.placed}
    sharding = functools.partial(meshes.parameter_sharding, devices)
    return source.load(dtype=settings.compute_dtype, sharding=sharding, **how)


def check_beginning(config: Config) -> None:
    """Raises UserError unless a config's start and reference fit its model and adapters."""
    starts.check_beginning(*arguments.starts(config), arguments.adapters(config))


def make_mesh(config: Config) -> Any:
    """Returns the mesh of a config; UserError if the devices or the batch do not fit it."""
    devices = meshes.make_mesh(**mesh_axes(config))
    train = config.train
    meshes.check_batch(train.batch_size, train.accumulation or 1, devices, train.group)
    return devices


def open_data(config: Config, workdir: epath.Path) -> EncodedPairs | Mixture:
    """Opens a config's encoded pairs; UserError if they are not what it asks for."""
    check_data(config, workdir)
    mix = checks.parse_mix(config.data.mix or ())
    return open_mixture(mix) if mix else open_pairs(config.data.encoded or workdir / "encoded")


def check_data(config: Config, workdir: epath.Path) -> None:
    """Raises UserError unless a config's encoded folders are there and hold what it asks for."""
    mix = [folder for folder, _ in checks.parse_mix(config.data.mix or ())]
    for folder in mix or [config.data.encoded or workdir / "encoded"]:
        meta = load_meta(folder)
        if config.data.flip and not meta.flipped:
            raise UserError(
                f"data.flip flips pairs, and {folder} holds none that are flipped: encode with "
                "flips (--flip), or set --config.data.flip=False"
            )
        if config.data.flip_each and meta.image_kind:
            raise UserError(
                f"data.flip_each flips the two images of a pair apart, and those in {folder} share "
                "a given image: set --config.data.flip_each=False"
            )
        if config.data.ties == "drop" and meta.ties != "drop" and meta.tied_pairs:
            raise UserError(
                f"data.ties=drop, and {folder} holds {meta.tied_pairs} pairs that nobody prefers: "
                "encode with --ties=drop, or set --config.data.ties=keep to train on them"
            )


def warn(config: Config, pairs: EncodedPairs | Mixture, built: TrainingStep) -> None:
    """Logs the warnings of `checks.advice`."""
    for words in checks.advice(config, pairs.meta.counts["train"], built.model_size()):
        LOG.warning("%s", words)


def data_settings(config: Config) -> dict[str, Any]:
    """Arguments of `build.make_batches` that a config sets."""
    names = ("prompt_dropout", "flip", "flip_each", "num_threads", "prefetch")
    return {"seed": config.seed, **{name: config.data[name] for name in names}}


def grid_texts(
    config: Config, family: Family, pairs: EncodedPairs | Mixture
) -> tuple[list[str], dict[str, Embedded]]:
    """Returns the prompts of the config's image grids, and the embeddings that these need.

    No prompts if the run draws no grids. To be called before the model is loaded: what the pairs'
    prompt store lacks is embedded here, and the text encoders need the memory until it returns.
    """
    if not config.log.sample_every:
        return [], {}
    if reason := why_no_grids(family):
        LOG.warning(reason)
        return [], {}
    given, count = config.sample.prompts, config.sample.count
    prompts = load_texts(given)[:count] if given else pairs.first_texts(count)

    def load_pipeline() -> diffusers_io.Pipeline:
        given = arguments.pipeline(config)
        loaded = diffusers_io.load_pipeline(config.model.folder, **given, text=False)
        mesh = meshes.make_mesh(data=1, fsdp=-1)
        kw = {"variant": given["variant"], "dtype": given["dtype"]}
        return diffusers_io.with_text(loaded, **kw, mesh=mesh)

    try:
        texts = [*prompts, config.sample.negative_prompt or ""]
        return prompts, embed_texts(texts, pairs.prompts, load_pipeline)
    except (UserError, OSError) as error:  # a grid must not end a run
        LOG.warning("no image grids: their prompts cannot be embedded: %s", error)
        return [], {}


def grids(
    config: Config,
    built: TrainingStep,
    texts: tuple[list[str], dict[str, Embedded]],
    workdir: epath.Path,
) -> list[Draw]:
    """Returns the hook that draws image grids of `grid_texts`, or []."""
    prompts, embedded = texts
    if not prompts:
        return []

    def open_sampler() -> Any:
        given = {**arguments.pipeline(config), "text": False}
        loaded = diffusers_io.load_pipeline(config.model.folder, **given)
        return make_sampler(
            loaded,
            built.model,
            devices=built.mesh,
            embed=lambda texts: [embedded[text] for text in texts],
            **arguments.sampling(config),
        )

    every = config.log.sample_every
    return [Draw(built, make_draw(open_sampler, prompts, workdir / "samples"), every=every)]


def check_grids(config: Config) -> None:
    """Raises UserError if the sampler or the prompts of a config's image grids are missing."""
    _, family = diffusers_io.load_family(config.model.folder)
    if not config.log.sample_every or why_no_grids(family):
        return
    diffusers_io.load_schedule(config.model.folder)[1].check(config.sample.sampler)
    if config.sample.prompts:
        load_texts(config.sample.prompts)


def for_fork(config: Config, workdir: epath.Path) -> Config:
    """Returns a config as a fork of `workdir` runs it: on the data that are there, and no others.

    Collect and encode are left out: their results would not be those that the weights have seen.
    """
    found: Config = config.copy_and_resolve_references()
    found.jobs = tuple(job for job in config.jobs if job in ("train", "evaluate"))
    encoded = workdir / "encoded"
    if not config.data.encoded and not config.data.mix and encoded.exists():
        found.data.encoded = str(encoded)
    return found


def of_forked(workdir: epath.Path) -> dict[str, Any]:
    """Arguments of `fork.fork` that say what the run in `workdir` keeps."""
    config = configs.from_flat(storage.read_json(workdir / "config.json"))
    optimizer = {name: config.optimizer[name] for name in OPTIMIZER}
    kept = {"ema": config.train.ema_decay > 0, "moving": moving(config) is not None}
    return {"optimizer": optimizer, **kept}


def with_commits(config: Config, workdir: epath.Path) -> Config:
    """Returns the config with the commit of each hub id.

    A resumed run keeps those of its config.json: its reference must not change with the hub.
    """
    before = storage.find_json(workdir / "config.json") or {}
    config = config.copy_and_resolve_references()
    for leaf in ("folder", "vae", "start", "reference"):
        name, recorded = config.model[leaf], before.get(f"model.{leaf}") or ""
        if epath.Path(name).suffix != ".safetensors" and not epath.Path(name).is_file():
            config.model[leaf] = diffusers_io.pinned(name, recorded)
    return config


def with_debug_files(config: Config, workdir: epath.Path, *, write: bool = True) -> Config:
    """Returns the config with a tiny random model and synthetic pairs, written into workdir.

    The real jobs then run on them unchanged: encode, and train to `train.steps`.
    """
    model, pairs = "", "synthetic"
    if write:
        model, pairs = write_debug_files(workdir, family_named(config.debug.family))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.folder = str(model)
        config.model.vae = config.model.start = config.model.reference = ""
        config.data.source = f"pickapic:{pairs}"
        config.data.encoded, config.data.mix = "", None
        config.data.flip = config.data.flip_each = False
        config.jobs = ("encode", "train")
    return config

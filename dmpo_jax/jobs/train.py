"""Trains a UNet on encoded pairs: the loop around `step.train_step`."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.profiler import StepTraceAnnotation

from dmpo_jax import diffusers_io, storage
from dmpo_jax import progress as progress_bar
from dmpo_jax.config import arguments
from dmpo_jax.config import checks as config_checks
from dmpo_jax.config import leaves as configs
from dmpo_jax.data.batches import batches as pipeline
from dmpo_jax.data.batches.mixture import Mixture
from dmpo_jax.data.encoded import folder as records
from dmpo_jax.data.prompt_files import load_texts
from dmpo_jax.diffusion import noise as noising
from dmpo_jax.families import Family
from dmpo_jax.families.family import Facts
from dmpo_jax.jobs.convert import adapt, export
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.attention import best_kernel
from dmpo_jax.models.execution import Execution
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.parallel import mesh
from dmpo_jax.planning import compiled
from dmpo_jax.sampling.grids import make_draw, why_no_grids
from dmpo_jax.sampling.sampler import make_sampler
from dmpo_jax.training import checkpoint, health, metrics, optim, step
from dmpo_jax.training.stopping import Stopping, Watchdog
from dmpo_jax.training.telemetry import Watch, make_cost
from dmpo_jax.training.trace import Trace
from dmpo_jax.types import PairBatch

LOG = logging.getLogger(__name__)


class Run(NamedTuple):
    """Everything a run holds but its state."""

    config: configs.Config
    workdir: epath.Path
    devices: jax.sharding.Mesh
    pairs: records.EncodedPairs | Mixture
    unet: Any  # the policy without arrays: those are in `reference` and the state
    reference: dict[str, jax.Array] | None  # frozen; with LoRA what the adapters sit on
    setup: step.Setup
    learning_rate: Callable[[Any], jax.Array]
    key: jax.Array


def train(config: configs.Config, workdir: epath.Path) -> None:
    """Trains to `config.train.steps`, going on from the newest whole checkpoint in workdir.

    Writes metrics, checkpoints and sample grids as it goes, and `workdir/export` at the end.

    Raises:
        ValueError: before compiling, where model, data, mesh or workdir do not fit.
        watch.NonFiniteError: naming the step; nothing of that update was kept or saved.
        SystemExit: stopped by SIGTERM or Ctrl-C, after saving.
    """
    run, params = prepare(config, workdir)
    identity = configs.identity(config)
    folder = workdir / "checkpoints"
    with checkpoint.Checkpoints(folder, keep=config.log.keep, identity=identity) as checkpoints:
        if jax.process_index() == 0:  # only now: the folder is this run's own
            storage.write_json(workdir / "config.json", configs.flatten(config))
        wanted = abstract_state(run, params)
        fresh: Any = None if checkpoints.steps() else make_state(run, params)
        del params  # the state's own now, or in the way of what is restored
        start, state = checkpoints.restore(wanted) or (0, fresh)
        if start:
            LOG.info("going on from step %d in %s", start, folder)
        state = loop(run, state, checkpoints)
    export(config, workdir, int(state.step), trained(state))


def trained(state: step.TrainState) -> dict[str, jax.Array]:
    """What a run is for: the moving average where one is kept, else the parameters."""
    return state.params if state.ema is None else state.ema


def policy(run: Run, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The whole model that a state's parameters, or adapters, make."""
    return {**run.reference, **params} if run.setup.adapters and run.reference else params


def prepare(config: configs.Config, workdir: epath.Path) -> tuple[Run, dict[str, jax.Array]]:
    """Opens and checks everything; compiles nothing of the step.

    Returns the run, and the parameters to train: the UNet's, or its adapters.
    """
    devices = mesh.make_mesh(
        data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor
    )
    mesh.check_batch(config.train.batch_size, config.train.accumulation, devices)
    pairs = open_pairs(config, workdir)
    folder, family = diffusers_io.load_family(config.model.folder)
    schedule, _ = diffusers_io.load_schedule(folder)
    objective = OBJECTIVES[config.objective]
    frozen_dtype = functools.partial(parameters.frozen_dtype, dtype=config.model.compute_dtype)
    unet = diffusers_io.load_unet(
        folder,
        variant=config.model.variant or None,
        dtype=config.model.compute_dtype,
        param_dtype=frozen_dtype if config.lora.rank else "float32",
        sharding=functools.partial(mesh.parameter_sharding, devices),
    )
    check_fits(unet, family, pairs)
    unet.execution = make_execution(config, devices)
    check_splits(family.facts(unet.config), devices.shape["tensor"])
    unet = adapt(unet, config)
    structure, params = parameters.split(unet)
    unet = parameters.without_arrays(unet)  # or it would hold the arrays for ever
    reference = None
    if config.lora.rank:
        reference, params = lora.partition(params)
    elif objective.needs_reference:
        reference = make_reference(params, frozen_dtype)
    learning_rate, tx = make_optimizer(config)
    setup = make_setup(config, family, structure, schedule, tx, pairs.meta)
    # Not by device_put, which sends no keys to the devices of other processes.
    key = jax.jit(jax.random.key, out_shardings=mesh.replicated(devices))(config.seed)
    run = Run(config, workdir, devices, pairs, unet, reference, setup, learning_rate, key)
    return run, params


def make_setup(
    config: configs.Config,
    family: Family,
    structure: Any,
    schedule: Any,
    tx: Any,
    meta: Mapping[str, Any],
) -> step.Setup:
    """What the step closes over.

    structure: of the model. meta: what the encoded pairs say of themselves.
    """
    objective = OBJECTIVES[config.objective]
    return step.Setup(
        predict=family.make_predict(functools.partial(parameters.merge, structure)),
        objective=functools.partial(objective, **config.objectives[config.objective]),
        needs_reference=objective.needs_reference,
        needs_rejected=objective.needs_rejected,
        schedule=schedule,
        scaling_factor=meta["scaling_factor"],
        shift_factor=meta["shift_factor"],
        tx=tx,
        accumulation=config.train.accumulation,
        adapters=config.lora.rank > 0,
        dropout=config.lora.dropout,
        ema_decay=config.train.ema_decay,
        mean_only=pipeline.is_mean_only(meta),
        timesteps=noising.make_timesteps(schedule, **config.timesteps),
        safeguard=config.safeguard.mu,
    )


def make_curves(config: configs.Config, setup: step.Setup) -> health.Curves:
    """What of the pairs is logged: with u, where the objective is a function of it."""
    objective, settings = OBJECTIVES[config.objective], config.objectives[config.objective]
    softening = settings.get("alpha", settings.get("label_smoothing", None))
    return health.Curves(
        beta=settings.beta if objective.implied_logit else None,
        alpha=softening if objective.implied_logit else None,
        timesteps=setup.schedule.num_train_timesteps,
    )


def describe_learning_rate(config: configs.Config) -> str:
    """The rate that updates are made with, and how scripts with --scale_lr give the same one."""
    rate, pairs = config.optimizer.learning_rate, config.train.batch_size
    return (
        f"learning rate {rate:.4g} ({rate / pairs:.4g} a pair x {pairs} pairs an update, as "
        f"--scale_lr counts), after {config.optimizer.warmup_steps} updates of warmup, "
        f"{config.optimizer.schedule}"
    )


def make_execution(config: configs.Config, devices: jax.sharding.Mesh) -> Execution:
    """How the UNet's forward is carried out on these devices."""
    kernel = config.model.attention
    if kernel == "auto":
        kernel = best_kernel(devices.devices.flat[0].platform)
    return Execution(kernel, config.model.remat, config.model.scan)


def check_splits(facts: Facts, tensor: int) -> None:
    """ValueError where heads or groups of channels cannot be shared by `tensor` devices."""
    counts = facts.splits
    if any(count % tensor for count in counts):
        legal = [n for n in range(1, min(counts) + 1) if not any(c % n for c in counts)]
        raise ValueError(
            f"mesh.tensor must divide the model's heads and groups of channels {sorted(counts)}, "
            f"but got {tensor}: use one of {legal}, and mesh.fsdp to share memory further"
        )


def open_pairs(config: configs.Config, workdir: epath.Path) -> records.EncodedPairs | Mixture:
    """The encoded pairs that a config names: one folder, or several by weight."""
    if not config.data.mix:
        return records.open_pairs(config.data.encoded or workdir / "encoded")
    folders, weights = zip(*config_checks.parse_mix(config.data.mix), strict=True)
    return Mixture([records.open_pairs(folder) for folder in folders], weights)


def make_reference(params: dict[str, jax.Array], dtype: Callable[[str], Any]) -> Any:
    """A copy of the parameters, in the dtype that each is computed with, where they lie."""

    def copy(params):
        # Said outright: an output that is an input may share its buffer, which is donated later.
        return {path: jnp.array(x, dtype(path), copy=True) for path, x in params.items()}

    return jax.jit(copy, out_shardings=jax.tree.map(lambda x: x.sharding, params))(params)


def make_optimizer(config: configs.Config) -> tuple[Callable[[Any], jax.Array], Any]:
    """(learning rate by step, optax transformation) of a config."""
    learning_rate = optim.make_learning_rate(
        peak=config.optimizer.learning_rate,
        warmup_steps=config.optimizer.warmup_steps,
        total_steps=config.train.steps,
        schedule=config.optimizer.schedule,
    )
    names = ("name", "b1", "b2", "eps", "weight_decay", "clip_norm")
    tx = optim.make_optimizer(learning_rate, **{k: config.optimizer[k] for k in names})
    return learning_rate, tx


def check_fits(unet: Any, family: Family, pairs: records.EncodedPairs | Mixture) -> None:
    """ValueError where the encoded pairs were made for another model."""
    shapes, facts = pairs.meta["shapes"], family.facts(unet.config)
    latent, width = pipeline.latent_channels(pairs.meta), shapes["context"]["shape"][-1]
    wanted = facts.context_width
    family.check_channels(facts.in_channels, latent)
    if (kind := pairs.meta["image_kind"]) != family.given_kind:
        raise ValueError(
            f"a {family.name} model is given images of kind {family.given_kind!r}, the encoded "
            f"pairs hold {kind!r}: encode the pairs with this model"
        )
    if width != wanted:
        raise ValueError(
            f"the model takes context of width {wanted}, the encoded prompts have {width}: "
            "encode the pairs with this model's text encoders"
        )
    if bool(shapes["pooled"]) != bool(facts.pooled_width):
        raise ValueError(
            f"the encoded pairs do not fit a {family.name} model (pooled prompt embeddings "
            f"{'present' if shapes['pooled'] else 'absent'}): encode them with this model"
        )


def make_state(run: Run, params: dict[str, jax.Array]) -> step.TrainState:
    """The first state, laid out on the mesh. It takes the parameters over: they are donated."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(run, params))
    params = jax.device_put(params, mesh.parameter_sharding(run.devices, params))
    return jax.jit(_first_state(run), out_shardings=shardings, donate_argnums=0)(params)


def abstract_state(run: Run, params: dict[str, Any]) -> step.TrainState:
    """Shapes and shardings of a run's state, to restore onto."""
    shapes = jax.eval_shape(_first_state(run), params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        mesh.parameter_sharding(run.devices, shapes),
    )


def _first_state(run: Run) -> Callable[..., step.TrainState]:
    return functools.partial(step.make_state, tx=run.setup.tx, ema=run.setup.ema_decay > 0)


def loop(run: Run, state: step.TrainState, checkpoints: checkpoint.Checkpoints) -> step.TrainState:
    """From the state's step to the last. Metrics are read one step after they were asked for."""
    config, total, start = run.config, run.config.train.steps, int(state.step)
    update = make_update(run, state)
    validate, draw = make_validate(run), make_grids(run)
    sharding = mesh.batch_sharding(run.devices)
    batches = make_batches(run, start)
    cost = make_cost(config, run.unet.config, run.pairs.meta, run.setup, run.devices)
    curves = make_curves(config, run.setup)
    watch = Watch(config, start, learning_rate=run.learning_rate, cost=cost, curves=curves)
    LOG.info("%s", describe_learning_rate(config))
    with (
        Trace(config_checks.parse_profile(config.profile), run.workdir / "profile") as trace,
        metrics.MetricsWriter(
            run.workdir,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb or None,
            resume_step=start,
        ) as writer,
        progress_bar.Progress(total, start, config.objective) as progress,
        Stopping() as stop,
        Watchdog(config.train.hang_limit) as watchdog,
    ):
        if start == 0:
            with watch.timed("sampling"):
                draw(trained(state), 0)
        unread = None  # the last update's number and metrics
        for number in range(start + 1, total + 1):
            watchdog.alive(f"update {number}", slow=number == start + 1)
            with watch.timed("input"):
                batch = mesh.shard_batch(next(batches), sharding, config.train.batch_size)
            if number == start + 1 and not config.train.compiled:  # batches are all alike
                update = watch.compile(update, state, run.reference, batch, run.key)
            with jax.transfer_guard("disallow"), StepTraceAnnotation("train", step_num=number):
                state, measured = update(state, run.reference, batch, run.key)
            if unread is not None:
                watch.report(*unread, writer, progress)
            unread = (number, measured)
            stopping = stop.asked(number)
            checkpoints.check()
            validating = due(number, config.log.validate_every)
            saving = due(number, config.log.checkpoint_every) or number == total or stopping
            drawing = due(number, config.log.sample_every) or number == total
            if validating or saving or drawing or trace.due(number):
                watchdog.alive(f"what follows update {number}", slow=True)
                watch.report(*unread, writer, progress)  # a bad update ends the job here
                unread = None
            if trace.due(number):
                with watch.timed("profile"):
                    trace.switch()
            if validating:
                with watch.timed("validation"):
                    writer.write(number, validate(trained(state)))
            if saving:
                with watch.timed("checkpoint"):
                    checkpoints.save(number, state)
            if drawing and not stopping:
                with watch.timed("sampling"):
                    draw(trained(state), number)
            if stopping and number < total:
                checkpoints.wait()
                stop.leave(number)
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    return state


def make_grids(run: Run) -> Callable[[dict[str, jax.Array], int], None]:
    """(a state's parameters, or adapters, step) -> a grid of images; nothing where it cannot."""
    config = run.config
    _, family = diffusers_io.load_family(config.model.folder)
    if not config.log.sample_every:
        return lambda params, number: None
    if reason := why_no_grids(family):
        LOG.warning(reason)
        return lambda params, number: None

    def open_sampler():
        loaded = diffusers_io.load_pipeline(config.model.folder, **arguments.pipeline(config))
        return make_sampler(loaded, run.unet, devices=run.devices, **arguments.sampling(config))

    if config.sample.prompts:
        prompts = load_texts(config.sample.prompts)[: config.sample.count]
    else:  # the first captions of the data, after the empty one
        count = min(config.sample.count, run.pairs.meta["counts"]["prompts"] - 1)
        prompts = [run.pairs.prompts[i + 1].text for i in range(count)]
    draw = make_draw(open_sampler, prompts, run.workdir / "samples")
    return lambda params, number: draw(policy(run, params), number)


def check(config: configs.Config) -> None:
    """ValueError where the model or the prompts of image grids are missing."""
    diffusers_io.load_family(config.model.folder)
    if config.log.sample_every and config.sample.prompts:
        load_texts(config.sample.prompts)


def make_update(run: Run, state: step.TrainState) -> Callable[..., Any]:
    """The step: compiled at its first call, or read from `train.compiled`."""
    if not run.config.train.compiled:
        return step.jit_train_step(run.setup, jax.tree.map(lambda x: x.sharding, state))
    sharding = mesh.batch_sharding(run.devices)
    batch = pipeline.abstract_batch(run.pairs.meta, run.config.train.batch_size, sharding)
    arguments = (state, run.reference, batch, run.key)
    identified = compiled.identity(run.config, run.setup, arguments, run.devices)
    return compiled.load(run.config.train.compiled, identified, arguments)


def due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def make_batches(run: Run, start: int) -> Iterator[PairBatch]:
    config = run.config
    sharding = mesh.batch_sharding(run.devices)
    return pipeline.make_batches(
        run.pairs,
        "train",
        global_batch=config.train.batch_size,
        rows=mesh.local_rows(sharding, config.train.batch_size),
        seed=config.seed,
        start_step=start,
        prompt_dropout=config.data.prompt_dropout,
        flip=config.data.flip,
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
    )


def make_validate(run: Run) -> Callable[[Any], dict[str, float]]:
    """params -> loss and implicit accuracy on the validation split, always the same noise."""
    if "validation" not in run.pairs.meta["counts"]:
        if run.config.log.validate_every:
            LOG.warning("the encoded pairs have no validation split: nothing is validated")
        return lambda params: {}
    size = run.config.train.batch_size // run.config.train.accumulation
    sharding = mesh.batch_sharding(run.devices)
    rows = mesh.local_rows(sharding, size)
    one = jax.jit(
        functools.partial(step.validate_batch, setup=step.on_mesh(run.setup, run.devices)),
        compiler_options=step.COMPILER_OPTIONS,
    )
    # Far from every step's own key, so that validation never sees training's noise.
    key = jax.random.fold_in(run.key, 2**31)

    def validate(params: Any) -> dict[str, float]:
        totals: dict[str, float] = {}
        epoch = pipeline.make_epoch(run.pairs, "validation", global_batch=size, rows=rows)
        for i, local in enumerate(epoch):
            batch, weights = mesh.shard_batch(local, sharding, size)
            sums = one(params, run.reference, batch, weights, jax.random.fold_in(key, i))
            for name, value in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        weight = totals.pop("weight")
        return {f"validation_{name}": value / weight for name, value in totals.items()}

    return validate

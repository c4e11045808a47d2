"""Builds a training step; reads no files and no config.

`build` takes a family, a model, the noise table it is trained with, the encoded pairs' metadata,
the mesh and `StepSettings`, and returns a `TrainingStep`. The model holds arrays or only shapes.
With shapes nothing is computed, and the step is the same program.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax.data.batches import pipeline
from dmpo_jax.data.encoded.meta import EncodedMeta
from dmpo_jax.data.encoded.pair import OWN
from dmpo_jax.diffusion.noise import NoiseTable
from dmpo_jax.diffusion.timesteps import make_timesteps
from dmpo_jax.errors import UserError
from dmpo_jax.families.family import Facts, Family
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.execution import BEST, Execution
from dmpo_jax.models.lora import Adapters
from dmpo_jax.models.quantised import Holding, Quantised
from dmpo_jax.objectives.anchor import Anchor
from dmpo_jax.objectives.registry import Objective
from dmpo_jax.parallel import layouts, meshes
from dmpo_jax.training import health, optim, step
from dmpo_jax.types import PairBatch

Params = dict[str, Any]
COMPUTE, INT8 = FROZEN_DTYPES = ("compute", "int8")


@dataclasses.dataclass(frozen=True)
class Rate:
    """Arguments of `optim.make_learning_rate`."""

    peak: float | int
    warmup_steps: int = 0
    total_steps: int = 1
    schedule: str = "constant"


NO_RATE = Rate(peak=0.0)


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Settings of a training step.

    objective: with its `hyperparameters`. batch_size: pairs per update, over all devices.
    accumulation: microbatches. group: of `step.Setup`. sizes: of `pair.SIZES`, what a model that is
        told images' sizes is told. compute_dtype: of activations. frozen_dtype: one of
        FROZEN_DTYPES, of frozen kernels: the compute dtype or int8.
    execution: how the forward pass is executed; its attention may be AUTO.
    lora: None trains every parameter. ema_decay: 0 keeps no average.
    rate, optimizer: arguments of `optim.make_learning_rate` and `optim.make_optimizer`.
    timesteps: arguments of `timesteps.make_timesteps`. safeguard, anchor,
        moving: of `step.Setup`.
    """

    objective: Objective
    hyperparameters: Mapping[str, float | int]
    batch_size: int
    accumulation: int = 1
    group: int | None = None
    sizes: str = OWN
    compute_dtype: Any = "float32"
    frozen_dtype: str = COMPUTE
    execution: Execution = BEST
    lora: Adapters | None = None
    ema_decay: float | int = 0.0
    rate: Rate = NO_RATE
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timesteps: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    safeguard: float | int | None = None
    anchor: Anchor | None = None
    moving: step.Moving | None = None

    def holding(self, family: Family) -> Holding:
        """Returns how a family's frozen parameters are held."""
        return Holding(self.compute_dtype, self.frozen_dtype == INT8, family.sensitive)

    @property
    def needs_reference(self) -> bool:
        """True if the reference predicts."""
        anchored = self.anchor is not None and self.anchor.needs_reference
        return self.objective.needs_reference or anchored

    def describe_rate(self) -> str:
        """Describes the learning rate, also per pair as scripts with --scale_lr state it."""
        rate, pairs = self.rate, self.batch_size
        return (
            f"learning rate {rate.peak:.4g} ({rate.peak / pairs:.4g} a pair x {pairs} pairs an "
            f"update, as --scale_lr counts), after {rate.warmup_steps} updates of warmup, "
            f"{rate.schedule}"
        )


class Beginning(NamedTuple):
    """The start of a run and its reference, where these are not the model itself.

    adapters: first values of LoRA adapters; None: they begin as nothing.
    reference: frozen parameters that margins are measured against: all that are trained, or with
        LoRA adapters on the same base, {} for the base itself. None: what training begins with.
    """

    adapters: Params | None = None
    reference: Params | None = None


DEFAULT = Beginning()


class TrainingStep(NamedTuple):
    """A training step and everything of a run that stays constant, except the data.

    model: the policy's structure, with shapes in place of arrays.
    reference: frozen parameters; with LoRA the base model's. Arrays, or shapes with shardings.
        None if neither adapters, the objective nor the model's buffers need any.
    learning_rate: by update.
    """

    settings: StepSettings
    family: Family
    meta: EncodedMeta
    mesh: jax.sharding.Mesh
    model: Any
    reference: Params | None
    setup: step.Setup
    learning_rate: Callable[[Any], jax.Array]

    def policy(self, params: Params) -> Params:
        """Returns all parameters of the policy from a state's parameters or adapters."""
        return parameters.completed(params, self.reference)

    def model_size(self) -> int:
        """Returns the number of the model's parameters, adapters included."""
        return sum(math.prod(x.shape) for x in parameters.shapes(self.model).values())

    def batch_sharding(self) -> jax.sharding.NamedSharding:
        return meshes.batch_sharding(self.mesh)

    def abstract_state(self, params: Params) -> step.TrainState:
        """Returns shapes and formats of the state that trains `params` (arrays or shapes)."""
        shapes = jax.eval_shape(self._first_state(), params)
        return place(shapes, layouts.parameter_formats(self.mesh, shapes))

    def make_state(self, params: Params) -> step.TrainState:
        """Returns the first state, sharded over the mesh. The parameters are donated."""
        formats = layouts.formats_of(self.abstract_state(params))
        params = jax.device_put(params, meshes.parameter_sharding(self.mesh, params))
        params = layouts.arrange(params, self.mesh, donate=True)
        return jax.jit(self._first_state(), out_shardings=formats, donate_argnums=0)(params)

    def _first_state(self) -> Callable[..., step.TrainState]:
        return functools.partial(
            step.make_state,
            tx=self.setup.tx,
            ema=self.setup.ema_decay > 0,
            moving=self.setup.moving is not None,
        )

    def make_update(self, state: step.TrainState) -> Any:
        """Returns the jitted update, (state, reference, batch, key) -> (state, metrics).

        It is jitted for this state's shardings and formats.
        """
        return step.jit_train_step(self.setup, layouts.formats_of(state))

    def make_validate(self) -> Any:
        """Jits `step.validate_batch`: its arguments without setup -> sums."""
        return jax.jit(
            functools.partial(step.validate_batch, setup=step.on_mesh(self.setup, self.mesh)),
            compiler_options=step.COMPILER_OPTIONS,
        )

    def make_key(self, seed: int) -> jax.Array:
        """Returns the run's random key, replicated on every device of the mesh."""
        # Not device_put: it cannot place keys on the devices of other processes.
        return jax.jit(jax.random.key, out_shardings=meshes.replicated(self.mesh))(seed)

    def abstract_arguments(self, params: Params) -> tuple[Any, ...]:
        """Returns shapes and shardings of the update's arguments: state, reference, batch, key."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = self.meta.abstract_batch(self.settings.batch_size, self.batch_sharding())
        reference: Any = self.reference
        if reference is not None:
            reference = place(reference, layouts.parameter_formats(self.mesh, reference))
        key = place(key, meshes.replicated(self.mesh))
        return self.abstract_state(params), reference, batch, key


def build(
    family: Family,
    model: Any,
    noise: NoiseTable,
    meta: EncodedMeta,
    mesh: jax.sharding.Mesh,
    settings: StepSettings,
    *,
    tx: Any = None,
    beginning: Beginning = DEFAULT,
) -> tuple[TrainingStep, Params]:
    """Builds a training step; returns it and the parameters to train: the model's, or its adapters.

    Args:
        model: of `family.model`, with arrays, or with shapes only (`parameters.abstract`), which
            computes nothing. The step takes over its arrays. Its `execution` is set.
        noise: of the folder's scheduler. meta: of the encoded pairs.
        tx: an optimizer in place of the one that the settings describe.
        beginning: first adapters and the reference, where these are not the model's.

    Raises:
        ValueError: mesh, batch, model and pairs do not fit; the message says what would.
    """
    meshes.check_batch(settings.batch_size, settings.accumulation, mesh, settings.group)
    facts = family.facts(model.config)
    check_fits(family, facts, meta)
    if settings.sizes != OWN and not family.told_sizes:
        raise UserError(
            f"data.sizes={settings.sizes} is what a model is told of images' sizes, and a "
            f"{family.name} model is told nothing of them: unset it"
        )
    check_splits(facts, mesh.shape["tensor"])
    model.execution = settings.execution.on(mesh)
    abstract = _is_abstract(model)
    if settings.lora is not None:
        model = settings.lora.attach(model)
    if abstract:  # adapters have arrays even in a model of shapes
        model = parameters.without_arrays(model)
    structure, params = parameters.split(model)
    params, buffers = parameters.partition(model, params)
    model = parameters.without_arrays(model)  # or it would keep the arrays alive
    held = settings.holding(family)
    reference, params = make_reference(params, buffers, settings, held, mesh, beginning)
    if not abstract:
        reference = layouts.arrange(reference, mesh)
    learning_rate, described = make_optimizer(settings)
    setup = make_setup(family, structure, noise, meta, tx or described, settings)
    built = TrainingStep(settings, family, meta, mesh, model, reference, setup, learning_rate)
    return built, params


def make_reference(
    params: Params,
    buffers: Params,
    settings: StepSettings,
    held: Holding,
    mesh: jax.sharding.Mesh,
    beginning: Beginning = DEFAULT,
) -> tuple[Params | None, Params]:
    """Splits a model's parameters into (frozen parameters or None, parameters to train).

    With adapters the base itself is frozen, and beside it the reference's own adapters if it has
    any; without them the reference is the base. Otherwise, if the objective needs a reference, the
    frozen parameters are the given ones, or a copy. Each has the dtype that it is computed in, or
    is quantised. Buffers are always frozen.
    """
    frozen = {path: held(path, x) for path, x in buffers.items()}
    if settings.lora is not None:
        base, params = lora.partition(params)
        frozen |= {path: held.placed(path, x) for path, x in base.items()}
        own = beginning.adapters if beginning.reference is None else beginning.reference
        if own and settings.needs_reference and settings.moving is None:
            frozen |= jax.device_put(dict(own), meshes.parameter_sharding(mesh, dict(own)))
        first = {path: jnp.asarray(x) for path, x in (beginning.adapters or {}).items()}
        return frozen, {**params, **first}
    if beginning.reference is not None and settings.needs_reference:
        given = beginning.reference.items()
        return {path: held.placed(path, x) for path, x in given} | frozen, params
    if not settings.needs_reference or settings.moving is not None:
        return frozen or None, params

    def copy(params: Params) -> Params:
        # Explicit, since an output that is an input may share its buffer, which is donated later.
        return {
            path: kept if isinstance(kept, Quantised) else jnp.array(kept, copy=True)
            for path, kept in ((path, held(path, x)) for path, x in params.items())
        }

    shapes = {
        path: held(path, jax.ShapeDtypeStruct(x.shape, x.dtype)) for path, x in params.items()
    }
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in params.values()):
        return {**shapes, **frozen}, params
    copied = jax.jit(copy, out_shardings=meshes.parameter_sharding(mesh, shapes))(params)
    return {**copied, **frozen}, params


def make_setup(
    family: Family,
    structure: Any,
    noise: NoiseTable,
    meta: EncodedMeta,
    tx: Any,
    settings: StepSettings,
) -> step.Setup:
    """Returns the constants of the step. structure: the model's, from `parameters.split`."""
    objective, lora_settings = settings.objective, settings.lora
    return step.Setup(
        predict=family.make_predict(functools.partial(parameters.merge, structure)),
        objective=functools.partial(objective, **settings.hyperparameters),
        needs_reference=settings.needs_reference,
        needs_rejected=objective.needs_rejected,
        schedule=noise,
        scaling_factor=meta.scaling_factor,
        shift_factor=meta.shift_factor,
        pack=meta.pack,
        tx=tx,
        accumulation=settings.accumulation,
        group=settings.group,
        adapters=lora_settings is not None,
        dropout=lora_settings.dropout if lora_settings else 0.0,
        ema_decay=settings.ema_decay,
        mean_only=meta.mean_only,
        timesteps=make_timesteps(noise, **settings.timesteps),
        safeguard=settings.safeguard,
        anchor=settings.anchor,
        moving=settings.moving,
    )


def make_optimizer(settings: StepSettings) -> tuple[Callable[[Any], jax.Array], Any]:
    """Returns (learning rate by update, optax transformation)."""
    learning_rate = optim.make_learning_rate(**dataclasses.asdict(settings.rate))
    return learning_rate, optim.make_optimizer(learning_rate, **settings.optimizer)


def make_curves(settings: StepSettings, setup: step.Setup) -> health.Curves:
    """Returns the run's `Curves`, with u if the objective is a function of it."""
    implied, given = settings.objective.implied_logit, settings.hyperparameters
    softening = given.get("alpha", given.get("label_smoothing", None))
    return health.Curves(
        beta=given["beta"] if implied else None,
        alpha=softening if implied else None,
        timesteps=setup.schedule.num_train_timesteps,
    )


def check_splits(facts: Facts, tensor: int) -> None:
    """Raises ValueError if `tensor` devices cannot share heads or groups of channels evenly."""
    counts = facts.splits
    if any(count % tensor for count in counts):
        legal = [n for n in range(1, min(counts) + 1) if not any(c % n for c in counts)]
        raise UserError(
            f"mesh.tensor must divide the model's heads and groups of channels {sorted(counts)}, "
            f"but got {tensor}: use one of {legal}, and mesh.fsdp to share memory further"
        )


def check_fits(family: Family, facts: Facts, meta: EncodedMeta) -> None:
    """Raises ValueError if the encoded pairs were made for another model."""
    arrays = meta.arrays
    if meta.pack != family.pack:
        raise UserError(
            f"a {family.name} model takes latents packed {family.pack} x {family.pack}, the "
            f"encoded pairs are packed {meta.pack} x {meta.pack}: encode them with this model"
        )
    family.check_takes(facts, meta.latent_channels)
    if meta.image_kind != family.given_kind:
        raise UserError(
            f"a {family.name} model is given images of kind {family.given_kind!r}, the encoded "
            f"pairs hold {meta.image_kind!r}: encode the pairs with this model"
        )
    if (width := arrays.context.shape[-1]) != facts.context_width:
        raise UserError(
            f"the model takes context of width {facts.context_width}, the encoded prompts have "
            f"{width}: encode the pairs with this model's text encoders"
        )
    if bool(arrays.pooled) != bool(facts.pooled_width):
        raise UserError(
            f"the encoded pairs do not fit a {family.name} model (pooled prompt embeddings "
            f"{'present' if arrays.pooled else 'absent'}): encode them with this model"
        )


def make_batches(
    built: TrainingStep, pairs: Any, *, seed: int, start: int = 0, **reading: Any
) -> Iterator[PairBatch]:
    """Returns this process's rows of the training batches from update `start` on, without end.

    reading: further arguments of `data.batches.make_batches`.
    """
    size = built.settings.batch_size
    rows = meshes.local_rows(built.batch_sharding(), size)
    return pipeline.make_batches(
        pairs,
        "train",
        global_batch=size,
        rows=rows,
        seed=seed,
        start_step=start,
        sizes=built.settings.sizes,
        **reading,
    )


def place(shapes: Any, shardings: Any) -> Any:
    """Converts arrays or shapes to shapes with these shardings (one, or a tree) or formats."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _is_abstract(model: Any) -> bool:
    leaves = jax.tree.leaves(parameters.split(model)[1])
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)

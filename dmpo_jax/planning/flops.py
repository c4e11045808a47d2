"""Floating-point operations of a step: matrix products and convolutions, 2 per multiply-add.

Padding counts as data. Norms, activations and softmax are not counted. XLA's own analysis is
not used: it counts a loop's body once, whatever its trips.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from dmpo_jax.data.encoded.meta import EncodedMeta
from dmpo_jax.families.family import Family
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.execution import Execution
from dmpo_jax.planning import chips
from dmpo_jax.training.build import TrainingStep
from dmpo_jax.training.telemetry import Cost
from dmpo_jax.types import Condition

# Scanned blocks are traced once; attention is plain, since kernels hide their products.
COUNTED = Execution(attention="plain", remat="none", scan=True)
# Origin of a value.
FROZEN, ADAPTER, DATA = "weights", "adapters", "attention"
_CUDNN = re.compile(r"dot_product_attention_(fwd|bwd)(?:_wrapper)?")  # JAX's primitives


class Forward(NamedTuple):
    """FLOPs of a forward pass, grouped by their cost in the backward pass.

    weights: activations times weights. attention: activations times activations.
    adapters: products that low-rank adapters add.
    """

    weights: int
    attention: int
    adapters: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.attention + self.adapters


def forward_flops(family: Family, model: Any, meta: EncodedMeta) -> Forward:
    """Returns the FLOPs of one image's forward pass, `.total` their sum; nothing is computed.

    Args:
        model: with arrays or with shapes, with or without adapters. meta: of its pairs.

    Counted as for a TPU: on a CPU, convolutions with few output pixels omit the taps that only
    meet padding.
    """
    execution = getattr(model, "execution", None)
    if execution is not None:
        model.execution = COUNTED
    try:
        structure, params = parameters.split(model)
        batch = meta.abstract_batch(1)
        latents = jax.ShapeDtypeStruct((1, *meta.latents), jnp.float32)
        predict = family.make_predict(functools.partial(parameters.merge, structure))

        def forward(frozen: Any, adapters: Any, latents: Any, time: Any, told: Condition) -> Any:
            return predict({**frozen, **adapters}, latents, time, told.per_image(1))

        shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}
        given = (
            *lora.partition(shapes),
            latents,
            jax.ShapeDtypeStruct((1,), jnp.int32),
            batch.condition,
        )
        with jax.sharding.use_abstract_mesh(_one_tpu()):
            traced = jax.make_jaxpr(forward)(*given)
        made_of = [
            kind
            for kind, part in zip((FROZEN, ADAPTER, DATA, DATA, DATA), given, strict=True)
            for _ in jax.tree.leaves(part)
        ]
        counts, _ = _count(traced.jaxpr, made_of)
        return Forward(counts[FROZEN], counts[DATA], counts[ADAPTER])
    finally:
        if execution is not None:
            model.execution = execution


def _one_tpu() -> jax.sharding.AbstractMesh:
    device = jax.sharding.AbstractDevice("TPU v5", num_cores=1, platform="tpu")
    return jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)


def step_flops(
    forward: Forward, *, needs_reference: bool, needs_rejected: bool, lora: bool = False
) -> int:
    """Returns the FLOPs of one pair in a training step, without recomputation and optimizer.

    Args:
        forward: of one image.
        needs_reference, needs_rejected: of the objective.
        lora: only adapters are trained.

    An image takes the policy's forward and backward pass, and the reference's forward pass. The
    backward of a product is two products of the same size, one for each operand's gradient.
    With adapters the gradient of every frozen weight is omitted. Attention's two operands and
    the adapters still have both, and the reference runs through the adapters, switched off.
    Counted although not computed: the gradients of the model's inputs and, with adapters, of
    everything before the first of them. Together below 1 % at full size.
    """
    backward = 2 * (forward.attention + forward.adapters) + (1 if lora else 2) * forward.weights
    image = forward.total + backward + (forward.total if needs_reference else 0)
    return image * (2 if needs_rejected else 1)


def pair_flops(built: TrainingStep) -> int:
    """Returns the FLOPs of one pair in this step."""
    setup = built.setup
    return step_flops(
        forward_flops(built.family, built.model, built.meta),
        needs_reference=setup.needs_reference,
        needs_rejected=setup.needs_rejected,
        lora=setup.adapters,
    )


def make_cost(built: TrainingStep) -> Cost:
    """Returns the factors that convert this step's pairs per second to FLOP/s."""
    chip = chips.lookup(built.mesh.devices.flat[0].device_kind)
    return Cost(pair_flops(built), built.mesh.size, chip.flops if chip else None)


def jaxpr_flops(jaxpr: Any) -> int:
    """Returns the FLOPs of a traced program as it stands, recomputation included.

    Args:
        jaxpr: of `jax.make_jaxpr(f)(...)`, or `jax.jit(f).trace(...).jaxpr`.

    A scan counts its length, a Pallas kernel its grid, a shard_map its devices, a branch its
    most expensive side. A while loop, whose trips are unknown, counts once. Of cuDNN's attention
    two products count, in its backward five: the scores are made again. Other kernels from
    outside XLA are not counted.
    """
    counts, _ = _count(getattr(jaxpr, "jaxpr", jaxpr), None)
    return sum(counts.values())


def _count(jaxpr: Any, made_of: Sequence[str] | None) -> tuple[collections.Counter[str], list[str]]:
    """Returns (FLOPs by origin of the products' operands, origin of each output).

    made_of: FROZEN, ADAPTER or DATA for each input; None is DATA for all. A value made of data
    and anything else is DATA, and one made of no input is FROZEN.
    """
    kinds = dict(zip(jaxpr.invars, made_of or [DATA] * len(jaxpr.invars), strict=True))
    counts: collections.Counter[str] = collections.Counter()

    def kind(atom: Any) -> str:
        return FROZEN if isinstance(atom, core.Literal) else kinds.get(atom, FROZEN)

    for equation in jaxpr.eqns:
        of = [kind(atom) for atom in equation.invars]
        outputs = [_merged(of)] * len(equation.outvars)
        if own := _product(equation):
            pair = sorted(of[:2], key=(DATA, FROZEN, ADAPTER).index)
            counts[pair[-1]] += own
        elif inner := list(_jaxprs(equation.params)):
            # A branch's first operand selects it. For other programs the inputs are unknown.
            found = [_count(sub, _last(of, len(sub.invars))) for sub in inner]
            name = equation.primitive.name
            parts = [part for part, _ in found]
            once = max(parts, key=lambda c: c.total()) if name == "cond" else sum(parts, _NONE)
            times = _times(name, equation.params)
            counts.update({key: times * value for key, value in once.items()})
            if len(found[0][1]) == len(outputs):
                outputs = found[0][1]
        kinds.update(zip(equation.outvars, outputs, strict=True))
    return counts, [kind(atom) for atom in jaxpr.outvars]


def _last(kinds: Sequence[str], count: int) -> Sequence[str] | None:
    """Returns the kinds of an equation's last `count` inputs, which its program takes.

    None if the program has more: kernels' references.
    """
    return kinds[len(kinds) - count :] if count <= len(kinds) else None


_NONE: collections.Counter[str] = collections.Counter()


def _merged(kinds: Sequence[str]) -> str:
    return DATA if DATA in kinds else ADAPTER if ADAPTER in kinds else FROZEN


def _product(equation: Any) -> int:
    """Returns the FLOPs of a matrix product or a convolution; 0 for other equations."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        inner = math.prod(shape[axis] for axis in contracted)
        return 2 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        inner = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        # The gradient of a strided one has zeros between its elements: no work.
        zeros = math.prod(params["lhs_dilation"])
        return 2 * inner * math.prod(equation.outvars[0].aval.shape) // zeros
    if found := _CUDNN.fullmatch(name):
        query, key = (equation.invars[i].aval.shape for i in (0, 1))
        tokens = 2 if params["layout"] else 1  # BNTH or BTNH
        return (4 if found[1] == "fwd" else 10) * math.prod(query) * key[tokens]
    return 0


def _times(name: str, params: Mapping[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # over its manual axes; along the others it sees full arrays
        sizes = dict(params["mesh"].shape)
        axes = params.get("newly_manual_axes", params.get("manual_axes", sizes))
        return math.prod(sizes[axis] for axis in axes)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the programs in an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield getattr(one, "jaxpr", one)

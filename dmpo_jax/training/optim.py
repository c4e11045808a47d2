"""Learning-rate schedules, and the optax chain that applies them.

Parameters are a flat dict, `{dotted path: array}`; nothing here depends on it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dmpo_jax.errors import UserError
from dmpo_jax.training.adafactor import scale_by_factored_rms

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "adamw_bf16", "adafactor")
SMALLEST_EPS = 1e-30  # well inside float32's normal numbers; smaller ones may become 0


def make_learning_rate(
    *, peak: float, warmup_steps: int, total_steps: int, schedule: str = "constant"
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Returns a linear warmup to `peak`, then `schedule` down to zero at `total_steps`.

    Args:
        peak: the rate after the warmup, for the global batch (not scaled with its size).
        warmup_steps: number of warmup updates; update s of it has the rate
            `peak * (s + 1) / warmup_steps`, so the last one has `peak`.
        total_steps: where "cosine" (half a period) and "linear" would reach zero: the
            update after the last. "constant" ignores it.
        schedule: "constant", "cosine" or "linear".

    Returns:
        step (0 for the first update) -> learning rate, a float32 scalar; jittable.

    Raises:
        ValueError: unknown schedule, a negative rate or warmup, or a warmup that leaves
            "cosine" or "linear" no step to decay in.

    The published scripts begin the warmup at exactly 0: their first update, a forward and a
    backward pass over the global batch, changes nothing. This warmup is theirs, one step ahead.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}, but got {schedule!r}")
    if peak < 0:
        raise UserError(f"the learning rate must be at least 0, but got {peak}")
    if warmup_steps < 0:
        raise UserError(f"warmup_steps must be at least 0, but got {warmup_steps}")
    if schedule != "constant" and total_steps <= warmup_steps:
        raise UserError(
            f"the {schedule} schedule needs total_steps above warmup_steps, but got "
            f"total_steps={total_steps} and warmup_steps={warmup_steps}"
        )

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
        if schedule == "constant":
            return peak * warmup
        # 0 at the update after the warmup, 1 at total_steps, which is never run.
        down = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        decay = 1 - down if schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * down))
        return peak * warmup * decay

    return learning_rate


def at_step(opt_state: Any, step: jax.typing.ArrayLike) -> Any:
    """Returns an optimizer's state whose learning rate is that of update `step`.

    optax counts the updates that it has made, and so falls behind with every skipped one.
    """

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda x: x._replace(count=jnp.asarray(step, x.count.dtype)) if is_schedule(x) else x,
        opt_state,
        is_leaf=is_schedule,
    )


def make_optimizer(
    learning_rate: float | Callable,
    *,
    name: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Returns clipping by global norm, followed by the named optimizer.

    Args:
        learning_rate: a number, or a schedule from `make_learning_rate`.
        name: "adamw": 8 bytes of state per parameter. "adamw_bf16": the same with the first
            moment in bfloat16, 6 bytes. "adafactor": factored second moments and no first
            ones, little state (`adafactor`); as in published SDXL runs: no scaling with the
            parameters' size, updates clipped to a root mean square of 1.
        b1: decay of AdamW's first moment; Adafactor keeps none.
        b2: decay of AdamW's second moment; Adafactor's follows `1 - step**-0.8`.
        eps: added to AdamW's denominator, at least SMALLEST_EPS: 0 / 0 where a gradient was always
            0; Adafactor adds 1e-30 to the squares.
        weight_decay: decoupled, times the learning rate, on *every* parameter, also norms and
            biases, like torch's optimizers in the published scripts.
        clip_norm: largest global gradient norm; 0 turns clipping off.

    Raises:
        ValueError: unknown name, or a number out of its range.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, but got {name!r}")
    for what, value in {"b1": b1, "b2": b2}.items():
        if not 0 <= value < 1:
            raise UserError(f"{what} must be in [0, 1), but got {value}")
    if not eps >= SMALLEST_EPS:
        raise UserError(f"eps must be at least {SMALLEST_EPS}, but got {eps}")
    for what, value in {"weight_decay": weight_decay, "clip_norm": clip_norm}.items():
        if not value >= 0:  # also rejects NaN
            raise UserError(f"{what} must be at least 0, but got {value}")

    chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if name in ("adamw", "adamw_bf16"):
        # Not the second moment: it changes by 1 - b2 of itself a step, below bfloat16's resolution.
        mu_dtype = jnp.bfloat16 if name == "adamw_bf16" else None
        chain += [optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)]
    else:
        # Not optax.adafactor: its weight decay is not multiplied by the learning rate.
        chain += [scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    chain += [optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)]
    return optax.chain(*chain)

"""The two sides of cpu_step.py: our compiled step, and the same in PyTorch."""

import functools
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

BETA, ALPHA, LEARNING_RATE, CLIP_NORM, WEIGHT_DECAY = 2000.0, 0.01, 1e-5, 1.0, 0.01
CHANNELS = 4
POLICY = 1.01  # times the reference: margins are nonzero from the first step


class Size(NamedTuple):
    """Shapes of a step's work, and how it is timed."""

    unet: dict[str, Any]
    tokens: int
    context: int
    side: int  # of the latents
    batch: int  # pairs a step
    optimizer: str  # "adamw", or "sgd" where AdamW's two moments would not fit
    together: bool  # both sides in one process, or one after another
    devices: int | None  # CPU devices of ours; None: one a thread
    rounds: int
    steps: int  # timed, a round
    first: float  # relative tolerance of the first step's numbers


def size_of(name: str) -> Size:
    if name == "digits":
        from dmpo_jax.toy.make import UNET

        unet = {k: v for k, v in UNET.items() if not k.startswith("_")}
        return Size(unet, 8, 32, 8, 64, "adamw", True, None, 15, 5, 1e-4)
    # diffusers' defaults are SD1.5's except this one. One pair cannot be split.
    # beta multiplies the rounding of a single pair: gradient norms differed by 2.5e-4.
    return Size({"cross_attention_dim": 768}, 77, 768, 8, 1, "sgd", False, 1, 3, 3, 1e-3)


def write_reference(folder: str, size: Size) -> None:
    """Writes a UNet folder of random weights."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(**size.unet).save_pretrained(folder)


class Ours:
    """Our `jit_train_step`, timed with everything that a real run does."""

    def __init__(self, folder: str, size: Size, moving: tuple[float, int] | None = None):
        """moving: (decay, every) of a reference that follows the policy; None: it is fixed."""
        import jax
        import jax.numpy as jnp
        import optax

        from dmpo_jax import diffusers_io
        from dmpo_jax.data.encoded.meta import EncodedMeta
        from dmpo_jax.diffusion import noise as noising
        from dmpo_jax.families import SD
        from dmpo_jax.objectives import OBJECTIVES
        from dmpo_jax.parallel import meshes
        from dmpo_jax.training.build import Rate, StepSettings, build
        from dmpo_jax.training.step import Moving
        from dmpo_jax.types import Condition, PairBatch

        jax.config.update("jax_enable_compilation_cache", False)
        devices = meshes.make_mesh()  # as many as main() asked for
        model = diffusers_io.load_unet(folder)
        noise = noising.make_ddpm_table(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        meta = EncodedMeta.expected(
            SD,
            SD.facts(model.config),
            size=(size.side, size.side),
            latent_channels=CHANNELS,
            tokens=size.tokens,
            scaling_factor=1.0,
            moments_dtype="float32",
        )
        settings = StepSettings(
            objective=OBJECTIVES["dmpo"],
            hyperparameters={"beta": BETA, "alpha": ALPHA},
            batch_size=size.batch,
            rate=Rate(peak=LEARNING_RATE),
            optimizer={"weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM},
            moving=Moving(*moving) if moving else None,
        )
        sgd = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.sgd(LEARNING_RATE))
        tx = None if size.optimizer == "adamw" else sgd
        self.built, params = build(SD, model, noise, meta, devices, settings, tx=tx)
        self.reference = self.built.reference
        self.setup = self.built.setup
        rng = np.random.default_rng(0)
        image = (size.batch, 2, size.side, size.side, CHANNELS)
        mean, logvar = rng.normal(size=image), np.full(image, -4.0)
        context = rng.normal(size=(size.batch, size.tokens, size.context))
        self.batch = PairBatch(
            moments=jnp.asarray(np.concatenate([mean, logvar], -1), jnp.float32),
            preference=jnp.ones(size.batch, jnp.float32),
            condition=Condition(jnp.asarray(context, jnp.float32)),
        )
        self.key = jax.random.key(0)
        self.batch = jax.device_put(self.batch, meshes.batch_sharding(devices))
        self.key = jax.device_put(self.key, meshes.replicated(devices))
        moved = {path: x * POLICY for path, x in params.items()}
        self.state = self.built.make_state(moved)
        self.metrics: dict[str, Any] = {}

    def compile(self) -> None:
        jitted = self.built.make_update(self.state)
        arguments = (self.state, self.reference, self.batch, self.key)
        self.compiled = jitted.lower(*arguments).compile()

    def noised(self) -> tuple[np.ndarray, ...]:
        """Returns (latents, timesteps, target, context) of the next step, for the other side."""
        import jax

        from dmpo_jax.training import step

        key = jax.random.fold_in(self.key, self.state.step)
        noise = jax.jit(lambda key, batch: step.noise_batch(key, batch, self.setup))
        noised, context = noise(key, self.batch), self.batch.condition.context
        arrays = (noised.latents, noised.timesteps, noised.target, context)
        return tuple(np.asarray(x) for x in arrays)

    def run(self, steps: int) -> None:
        import jax

        for _ in range(steps):
            self.state, self.metrics = self.compiled(
                self.state, self.reference, self.batch, self.key
            )
        jax.block_until_ready((self.state, self.metrics))

    def seen(self) -> dict[str, float]:
        return {name: float(self.metrics[name]) for name in ("loss", "grad_norm")}

    def flops(self) -> int:
        import jax

        from dmpo_jax.training import step

        update = functools.partial(step.train_step, setup=self.setup)
        return count_flops(
            jax.make_jaxpr(update)(self.state, self.reference, self.batch, self.key).jaxpr
        )


class Torch:
    """diffusers' UNet: policy, frozen reference under no_grad, factored loss, optimizer.

    choice: "LAYOUT,KIND", a memory format and one of KINDS.
    """

    KINDS: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "default": {},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }

    def __init__(self, folder: str, size: Size, threads: int, noised, *, choice: str):
        import torch
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        torch.set_num_threads(threads)
        layout, kind = choice.split(",")
        self.format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

        def load():
            unet: Any = UNet2DConditionModel.from_pretrained(folder, use_safetensors=True)
            return unet.to(memory_format=self.format)

        self.policy = load().train()
        self.reference = load().eval().requires_grad_(False)
        self.parameters = list(self.policy.parameters())
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.mul_(POLICY)
        options: dict[str, Any] = {"lr": LEARNING_RATE, **self.KINDS[kind]}
        if size.optimizer == "adamw":
            options["weight_decay"] = WEIGHT_DECAY
        optimizer = torch.optim.AdamW if size.optimizer == "adamw" else torch.optim.SGD
        self.optimizer = optimizer(self.parameters, **options)
        self.give(noised)
        self.loss = self.grad_norm = float("nan")

    def give(self, noised) -> None:
        """Sets the noised pairs of the next steps, laid out before the clock starts."""
        import torch

        latents, timesteps, target, context = (torch.from_numpy(x.copy()) for x in noised)
        self.latents, self.target = (
            x.flatten(0, 1).permute(0, 3, 1, 2).contiguous(memory_format=self.format)
            for x in (latents, target)
        )
        self.timesteps = timesteps.long().repeat_interleave(2)
        self.context = context.repeat_interleave(2, 0)

    def run(self, steps: int) -> None:
        import torch
        from torch.nn import functional

        arguments = (self.latents, self.timesteps, self.context)
        for _ in range(steps):
            with torch.no_grad():
                reference = self.reference(*arguments, return_dict=False)[0]
            policy = self.policy(*arguments, return_dict=False)[0]
            gain = (reference - policy) * (reference + policy - 2 * self.target)
            chosen, rejected = gain.mean((1, 2, 3)).reshape(-1, 2).unbind(1)
            u = 0.5 * BETA * (chosen - rejected)
            log_p, log_not_p = functional.logsigmoid(u), functional.logsigmoid(-u)
            loss = log_p.exp() * (log_p - math.log(1 - ALPHA))
            loss = (loss + log_not_p.exp() * (log_not_p - math.log(ALPHA))).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
            self.optimizer.step()
        self.loss, self.grad_norm = loss.item(), norm.item()

    def seen(self) -> dict[str, float]:
        return {"loss": self.loss, "grad_norm": self.grad_norm}


def count_flops(jaxpr: Any) -> int:
    """Counts multiplications and additions of matrix products and convolutions, recursively."""
    total = 0
    for eqn in jaxpr.eqns:
        shapes = [v.aval.shape for v in eqn.invars if hasattr(v.aval, "shape")]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(shapes[0][i] for i in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * inner
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.params["dimension_numbers"].rhs_spec
            inner = math.prod(shapes[1][i] for i in kernel[1:])
            outputs = math.prod(eqn.outvars[0].aval.shape)
            # Zeros that dilation puts between inputs need no product.
            total += 2 * outputs * inner // math.prod(eqn.params["lhs_dilation"])
        else:
            trips = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        total += trips * count_flops(inner)
    return total


def peak_resident_mb() -> float:
    # Not getrusage: its ru_maxrss outlives exec, so it is the parent's if that was larger.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def environment() -> dict[str, Any]:
    from importlib.metadata import version

    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    packages = ("jax", "flax", "optax", "torch", "diffusers")
    return {
        "cpu": model,
        "load_average_at_end": os.getloadavg()[0],
        "packages": {name: version(name) for name in packages},
    }

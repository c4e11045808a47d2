"""One DMPO update of the digits UNet on the CPU: ours against the same in PyTorch.

    python benchmarks/cpu_step.py

Both sides start from the same weights and get the same noised pairs; their losses and
gradient norms must agree before anything is timed. Rounds alternate, so that a busy
machine slows both. The ratio is torch / ours: above 1, ours is faster. PyTorch runs
eagerly, in the quicker of its memory formats and with the quickest of its AdamWs, and is
spared the noising, the health metrics and the check for a non-finite update.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

BETA, ALPHA, LEARNING_RATE, CLIP_NORM, WEIGHT_DECAY = 2000.0, 0.01, 1e-5, 1.0, 0.01
TOKENS, CONTEXT, CHANNELS, SIDE = 8, 32, 4, 8
RESULTS = pathlib.Path(__file__).parent / "results" / "cpu_step.json"


def main() -> None:
    args = parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import jax

    jax.config.update("jax_num_cpu_devices", args.threads)
    if args.memory_of:
        print(json.dumps(memory(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        write_models(folder)
        result = compare(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)
    print(f"written to {args.out}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--batch-size", type=int, default=64, help="pairs a step (64)")
    parser.add_argument("--rounds", type=int, default=15, help="of each side, alternating (15)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round (5)")
    parser.add_argument("--threads", type=int, default=cores, help=f"of both sides ({cores})")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help=f"({RESULTS})")
    parser.add_argument("--memory-of", choices=("ours", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--torch-choice", default="contiguous,default", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_models(folder: str) -> None:
    """reference/ and policy/: a UNet of the digits' size, and itself moved by one percent."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from dmpo_jax.jobs.make_digits import UNET

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{k: v for k, v in UNET.items() if not k.startswith("_")})
    unet.save_pretrained(f"{folder}/reference")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    unet.save_pretrained(f"{folder}/policy")


class Ours:
    """`jit_train_step` on one CPU device a thread; timed with all that a real run does."""

    def __init__(self, folder: str, batch_size: int):
        import jax
        import jax.numpy as jnp

        from dmpo_jax import diffusers_io, mesh, noising, objectives, optim, step
        from dmpo_jax.models import families, parameters
        from dmpo_jax.types import Conditioning, PairBatch

        jax.config.update("jax_enable_compilation_cache", False)
        devices = mesh.make_mesh()  # as many as main() asked for
        structure, params = parameters.split(diffusers_io.load_unet(f"{folder}/policy"))
        _, self.reference = parameters.split(diffusers_io.load_unet(f"{folder}/reference"))
        self.setup = step.Setup(
            predict=families.make_predict(functools.partial(parameters.merge, structure)),
            objective=functools.partial(objectives.OBJECTIVES["dmpo"], beta=BETA, alpha=ALPHA),
            needs_reference=True,
            needs_rejected=True,
            schedule=noising.make_noise_schedule(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
            ),
            scaling_factor=1.0,
            tx=optim.make_optimizer(LEARNING_RATE, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM),
        )
        rng = np.random.default_rng(0)
        image = (batch_size, 2, SIDE, SIDE, CHANNELS)
        mean, logvar = rng.normal(size=image), np.full(image, -4.0)
        context = rng.normal(size=(batch_size, TOKENS, CONTEXT))
        self.batch = PairBatch(
            moments=jnp.asarray(np.concatenate([mean, logvar], -1), jnp.float32),
            preference=jnp.ones(batch_size, jnp.float32),
            conditioning=Conditioning(jnp.asarray(context, jnp.float32)),
        )
        self.key = jax.random.key(0)
        everywhere = mesh.replicated(devices)
        self.batch = jax.device_put(self.batch, mesh.batch_sharding(devices))
        self.key, self.reference = jax.device_put((self.key, self.reference), everywhere)
        self.state = jax.device_put(step.make_state(params, self.setup.tx), everywhere)
        self.metrics: dict[str, Any] = {}

    def compile(self) -> float:
        """Seconds to trace, lower and compile the step."""
        from dmpo_jax import step

        start = time.perf_counter()
        jitted = step.jit_train_step(self.setup)
        arguments = (self.state, self.reference, self.batch, self.key)
        self.compiled = jitted.lower(*arguments).compile()
        return time.perf_counter() - start

    def noised(self) -> tuple[np.ndarray, ...]:
        """(latents, timesteps, target, context) of the next step, for the other side."""
        import jax

        from dmpo_jax import step

        key = jax.random.fold_in(self.key, self.state.step)
        noise = jax.jit(lambda key, batch: step.noise_batch(key, batch, self.setup))
        arrays = (*noise(key, self.batch), self.batch.conditioning.context)
        return tuple(np.asarray(x) for x in arrays)

    def run(self, steps: int) -> None:
        import jax

        for _ in range(steps):
            self.state, self.metrics = self.compiled(
                self.state, self.reference, self.batch, self.key
            )
        jax.block_until_ready((self.state, self.metrics))

    def flops(self) -> int:
        import jax

        from dmpo_jax import step

        update = functools.partial(step.train_step, setup=self.setup)
        return count_flops(
            jax.make_jaxpr(update)(self.state, self.reference, self.batch, self.key).jaxpr
        )


class Torch:
    """diffusers' UNet: policy, frozen reference under no_grad, factored loss, AdamW."""

    ADAMWS: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "default": {},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }

    def __init__(self, folder: str, threads: int, noised, *, layout: str, adamw: str):
        import torch
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        torch.set_num_threads(threads)
        self.format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

        def load(name: str):
            unet: Any = UNet2DConditionModel.from_pretrained(
                f"{folder}/{name}", use_safetensors=True
            )
            return unet.to(memory_format=self.format)

        self.policy = load("policy").train()
        self.reference = load("reference").eval().requires_grad_(False)
        self.parameters = list(self.policy.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **self.ADAMWS[adamw]
        )
        self.give(noised)
        self.loss = self.grad_norm = float("nan")

    def give(self, noised) -> None:
        """The noised pairs of the steps to come, laid out before the clock starts."""
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


def count_flops(jaxpr: Any) -> int:
    """Multiplications and additions of matrix products and convolutions, inner calls too."""
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


def compare(args: argparse.Namespace) -> dict[str, Any]:
    ours = Ours(args.folder, args.batch_size)
    compile_seconds = ours.compile()
    noised = ours.noised()
    choice = quickest_torch(args, noised)
    layout, adamw = choice.split(",")
    torch_side = Torch(args.folder, args.threads, noised, layout=layout, adamw=adamw)
    agreement = agree(ours, torch_side)
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for i in range(args.rounds):
        sides = [("ours", ours), ("torch", torch_side)]
        for name, side in sides if i % 2 else reversed(sides):
            side.run(1)  # wakes this side's threads, lets the other's go to sleep
            start = time.perf_counter()
            side.run(args.steps)
            times[name].append((time.perf_counter() - start) / args.steps)
    flops, floor = ours.flops(), floors(args.batch_size)
    ratios = [t / o for o, t in zip(times["ours"], times["torch"], strict=True)]
    result: dict[str, Any] = {
        "ratio": statistics.median(times["torch"]) / statistics.median(times["ours"]),
        "ratio_of_rounds": [min(ratios), statistics.median(ratios), max(ratios)],
        "flops_per_step": flops,
        "floor_gflops": floor,
        "agreement": agreement,
        "environment": environment(args),
    }
    for name in times:
        seconds = statistics.median(times[name])
        result[name] = {
            "milliseconds": 1e3 * seconds,
            "milliseconds_best": 1e3 * min(times[name]),
            "pairs_per_second": args.batch_size / seconds,
            "gflops": flops / seconds / 1e9,
            **measure_memory(args, name, choice),
        }
    result["ours"]["compile_seconds"] = compile_seconds
    result["torch"]["choice"] = choice
    return result


def quickest_torch(args: argparse.Namespace, noised) -> str:
    """The memory format, then the AdamW, with the smallest of a few step times."""

    def best(layout: str, adamw: str) -> float:
        side = Torch(args.folder, args.threads, noised, layout=layout, adamw=adamw)
        times = []
        for _ in range(4):  # the first, which warms up, is never the smallest
            start = time.perf_counter()
            side.run(1)
            times.append(time.perf_counter() - start)
        return min(times)

    layout = min(("contiguous", "channels_last"), key=lambda layout: best(layout, "default"))
    return f"{layout},{min(Torch.ADAMWS, key=lambda adamw: best(layout, adamw))}"


def agree(ours: Ours, torch_side: Torch, steps: int = 3) -> dict[str, list[list[float]]]:
    """[ours, torch] loss and gradient norm of the first steps, from equal weights and noise.

    Raises:
        ValueError: if they differ by more than rounding; the times would mean nothing.
    """
    seen: dict[str, list[list[float]]] = {"loss": [], "grad_norm": []}
    for i in range(steps):
        torch_side.give(ours.noised())
        ours.run(1)
        torch_side.run(1)
        for name in seen:
            pair = [float(ours.metrics[name]), getattr(torch_side, name)]
            seen[name].append(pair)
            # Later steps carry the first ones' rounding through Adam.
            tolerance = 1e-4 if i == 0 else 1e-2
            if not math.isclose(*pair, rel_tol=tolerance, abs_tol=tolerance):
                raise ValueError(f"step {i}: {name} should be equal, got ours, torch {pair}")
    return seen


def floors(batch_size: int) -> dict[str, float]:
    """GFLOP/s of one large matrix product and of the UNet's 64-channel convolution, alone."""
    import jax
    import jax.numpy as jnp
    import torch

    def best(call, flops: int) -> float:
        call()
        times = []
        for _ in range(20):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return flops / min(times) / 1e9

    n, side, c = 2 * batch_size, SIDE // 2, 64
    a, x, w = (
        np.random.default_rng(0).normal(size=shape).astype(np.float32)
        for shape in ((1024, 1024), (n, side, side, c), (3, 3, c, c))
    )
    dot = jax.jit(jnp.matmul)
    conv = jax.jit(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    ja, jx, jw = map(jnp.asarray, (a, x, w))
    ta = torch.from_numpy(a)
    tx = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    tw = torch.from_numpy(w).permute(3, 2, 0, 1).contiguous()
    dot_flops, conv_flops = 2 * 1024**3, 2 * n * side * side * 9 * c * c
    with torch.no_grad():
        return {
            "ours_matmul": best(lambda: dot(ja, ja).block_until_ready(), dot_flops),
            "torch_matmul": best(lambda: ta @ ta, dot_flops),
            "ours_conv": best(lambda: conv(jx, jw).block_until_ready(), conv_flops),
            "torch_conv": best(lambda: torch.nn.functional.conv2d(tx, tw, padding=1), conv_flops),
        }


def measure_memory(args: argparse.Namespace, name: str, choice: str) -> dict[str, float]:
    """`memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--folder", args.folder]
    command += ["--batch-size", str(args.batch_size), "--threads", str(args.threads)]
    command += ["--torch-choice", choice]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak resident MB of this process up to loading, in compiling and in three steps."""
    if args.memory_of == "ours":
        side = Ours(args.folder, args.batch_size)
    else:
        rng = np.random.default_rng(0)
        image = (args.batch_size, 2, SIDE, SIDE, CHANNELS)
        latents, target = rng.normal(size=(2, *image)).astype(np.float32)
        timesteps = rng.integers(0, 1000, args.batch_size)
        context = rng.normal(size=(args.batch_size, TOKENS, CONTEXT)).astype(np.float32)
        layout, adamw = args.torch_choice.split(",")
        noised = (latents, timesteps, target, context)
        side = Torch(args.folder, args.threads, noised, layout=layout, adamw=adamw)
    seen = {"loaded_mb": peak_resident_mb()}
    if isinstance(side, Ours):
        side.compile()
        seen["compile_peak_mb"] = peak_resident_mb()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    side.run(3)
    return seen | {"peak_mb": peak_resident_mb()}


def peak_resident_mb() -> float:
    # Not getrusage: its ru_maxrss outlives exec, and so is the parent's if that was larger.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def environment(args: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    packages = ("jax", "flax", "optax", "torch", "diffusers")
    return {
        "cpu": model,
        "threads": args.threads,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "steps_a_round": args.steps,
        "load_average_at_end": os.getloadavg()[0],
        "packages": {name: version(name) for name in packages},
    }


def print_table(result: dict[str, Any]) -> None:
    rows = [
        ("step, median ms", "milliseconds", ".1f"),
        ("step, best ms", "milliseconds_best", ".1f"),
        ("pairs/s", "pairs_per_second", ".0f"),
        ("GFLOP/s", "gflops", ".1f"),
        ("memory, loaded MB", "loaded_mb", ".0f"),
        ("memory, stepping MB", "peak_mb", ".0f"),
    ]
    print(f"{'':<22}{'ours':>10}{'torch':>10}")
    for label, key, form in rows:
        cells = (format(result[name][key], form) for name in ("ours", "torch"))
        print(f"{label:<22}" + "".join(f"{cell:>10}" for cell in cells))
    for kind in ("matmul", "conv"):
        cells = (result["floor_gflops"][f"{name}_{kind}"] for name in ("ours", "torch"))
        print(f"{kind + ' alone, GFLOP/s':<22}" + "".join(f"{cell:>10.1f}" for cell in cells))
    low, _, high = result["ratio_of_rounds"]
    print(f"torch / ours: {result['ratio']:.2f} (rounds {low:.2f} to {high:.2f})")
    print(f"{result['flops_per_step'] / 1e9:.2f} GFLOP a step; torch: {result['torch']['choice']}")
    ours = result["ours"]
    print(f"compiling ours: {ours['compile_seconds']:.1f} s, {ours['compile_peak_mb']:.0f} MB")


if __name__ == "__main__":
    main()

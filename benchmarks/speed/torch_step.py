"""One DMPO update in PyTorch: diffusers' UNet, bfloat16 autocast over float32 weights.

    python benchmarks/speed/torch_step.py CASE         # JSON, from gpu_step.py; prints JSON

The same update as ours: one timestep and one noise per pair, a frozen bfloat16 copy as the
reference, the factored loss, clipping, fused AdamW. It is set up as a fast PyTorch trainer
would be: channels_last, TF32 for the remaining float32, cuDNN's autotuner, attention by
scaled_dot_product_attention (flash if it supports the heads), gradients set to None.
"""

import copy
import json
import math
import pathlib
import sys
import time
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.nn import functional


def implied_logits(policy, reference, target, beta: float) -> torch.Tensor:
    """Computes u of each pair, from predictions [2B, C, H, W], chosen and rejected in turn."""
    policy, reference = policy.float(), reference.float()
    gain = (reference - policy) * (reference + policy - 2 * target)
    chosen, rejected = gain.mean((1, 2, 3)).reshape(-1, 2).unbind(1)
    return 0.5 * beta * (chosen - rejected)


def dmpo_loss(u: torch.Tensor, alpha: float) -> torch.Tensor:
    """Computes the mean KL from the implied preference to the label 1 - alpha."""
    log_p, log_not_p = functional.logsigmoid(u), functional.logsigmoid(-u)
    loss = log_p.exp() * (log_p - math.log(1 - alpha))
    return (loss + log_not_p.exp() * (log_not_p - math.log(alpha))).mean()


class TorchStep:
    """Policy, reference, optimizer and one batch of latents on a device."""

    def __init__(self, case: dict[str, Any], device: str):
        self.case, self.device = case, device
        torch.manual_seed(0)
        with torch.device(device):
            policy: Any = UNet2DConditionModel(**case["unet"])
        draw(policy)
        policy = policy.to(memory_format=torch.channels_last)
        self.reference = copy.deepcopy(policy).to(torch.bfloat16).eval().requires_grad_(False)
        self.policy = policy.train()
        if case["remat"] != "none":
            self.policy.enable_gradient_checkpointing()
        self.parameters = list(self.policy.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=case["learning_rate"], weight_decay=0.01, fused=True
        )
        if case["compile"]:
            self.policy.compile()
            self.reference.compile()
        pairs, side, channels = case["batch_size"], case["latents"], case["unet"]["in_channels"]
        self.latents = self._normal(2 * pairs, channels, side, side)
        self.context = self._each(self._normal(pairs, case["tokens"], case["context"]))
        self.added = None
        if case["pooled"]:
            sizes = torch.tensor([16.0 * side] * 2 + [0.0] * 2 + [8.0 * side] * 2, device=device)
            pooled = self._each(self._normal(pairs, case["pooled"]))
            self.added = {"text_embeds": pooled, "time_ids": sizes.repeat(2 * pairs, 1)}
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2
        self.signal = torch.cumprod(1 - betas, 0)
        self.u = torch.zeros(())

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device)

    def _each(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, 0)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def step(self) -> None:
        pairs = self.case["batch_size"]
        noise = self._each(self._normal(pairs, *self.latents.shape[1:]))
        timesteps = self._each(torch.randint(1000, (pairs,), device=self.device))
        signal = self.signal[timesteps].reshape(-1, 1, 1, 1)
        noised = signal.sqrt() * self.latents + (1 - signal).sqrt() * noise
        noised = noised.contiguous(memory_format=torch.channels_last)
        arguments = (noised, timesteps, self.context)
        given = {"added_cond_kwargs": self.added, "return_dict": False}
        with torch.autocast(self.device, torch.bfloat16):
            with torch.no_grad():
                reference = self.reference(*arguments, **given)[0]
            policy = self.policy(*arguments, **given)[0]
        u = implied_logits(policy, reference, noise, self.case["beta"])
        dmpo_loss(u, self.case["alpha"]).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.u = u.detach()


def draw(model: torch.nn.Module) -> None:
    """Draws kernels of deviation 1/sqrt(fan in), biases 0, as `parameters.initialise` does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def matmul_flops(side: int, device: str, blocks: int = 5, products: int = 10) -> float:
    """Measures FLOP/s of a bfloat16 product of two [side, side]: the best of some blocks."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    best = math.inf
    for _ in range(blocks + 1):
        began = time.perf_counter()
        for _ in range(products):
            c = a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        del c
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 * products / best


def peak_gigabytes(device: str) -> float:
    """Peak memory of tensors; on a CPU, of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def measure(case: dict[str, Any]) -> dict[str, Any]:
    device = "cpu" if case["tiny"] else "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    rate = matmul_flops(case["matmul"], device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    side = TorchStep(case, device)
    began = time.perf_counter()
    side.run(1)  # compiles, if requested
    first, u = time.perf_counter() - began, side.u.abs().max().item()
    side.run(case["warmup"])
    began = time.perf_counter()
    side.run(case["steps"])
    return {
        "seconds": (time.perf_counter() - began) / case["steps"],
        "first_step_seconds": first,
        "peak_gb": peak_gigabytes(device),
        "matmul_flops": rate,
        "max_u_at_step_0": u,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))

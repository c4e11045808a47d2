"""Our transformers against PyTorch's: outputs, gradients and files."""

from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from safetensors.numpy import load_file

from dmpo_jax import diffusers_io
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.layers import Linear
from dmpo_jax.parallel import meshes, placement


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def check(theirs: Any, folder, args: tuple, out: torch.Tensor, *, sign: int = 1) -> None:
    """Compares outputs (relative 1e-5) and the gradients of every parameter (1e-4).

    args: of our model. out: of PyTorch's, [N C H W], with its graph. sign: ours to theirs.
    """
    structure, params = parameters.split(diffusers_io.load_model(folder))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    ours_weight = weight.permute(0, 2, 3, 1).numpy() * sign

    def weighted(params, *args):
        predicted = parameters.merge(structure, params)(*args)
        return (predicted * ours_weight).sum(), predicted

    got, predicted = jax.jit(jax.grad(weighted, has_aux=True))(params, *args)
    wanted = out.detach().permute(0, 2, 3, 1).numpy() * sign
    assert relative_error(predicted, wanted) <= 1e-5
    want = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    ours = {
        diffusers_io.torch_name(p): diffusers_io.to_torch(p, np.asarray(g)) for p, g in got.items()
    }
    for name in ours.keys() - want.keys():
        assert not ours[name].any()  # a parameter that these inputs do not reach
    scale = np.linalg.norm([np.linalg.norm(g) for g in want.values()])
    for name, g in want.items():  # no single tensor may hide behind the large ones
        bound = 1e-4 * max(np.linalg.norm(g), 1e-3 * scale)
        assert np.linalg.norm(ours[name] - g) <= bound, name


def check_files(folder, out, load=diffusers_io.load_model, save=diffusers_io.save_model) -> None:
    """Compares what we write of a folder with what PyTorch wrote, bit for bit."""
    save(load(folder), out)
    name = "diffusion_pytorch_model.safetensors"
    want, got = load_file(folder / name), load_file(out / name)
    assert got.keys() == {key for key in want if not key.endswith("num_batches_tracked")}
    for key, array in got.items():
        np.testing.assert_array_equal(array, want[key], err_msg=key)


def check_sharded(model: Any, args: tuple, monkeypatch) -> None:
    """Compares a sharded model's loss and gradients with those of one device."""
    monkeypatch.setattr(meshes, "SHARDED_FROM", 256)
    structure, params = parameters.split(model)
    weights = np.random.default_rng(2).standard_normal(args[0].shape, np.float32)

    def run(mesh: Any) -> Any:
        forward = placement.over_rows(
            lambda params, *args: parameters.merge(structure, params)(*args), mesh
        )

        def loss(params, *args):
            return (forward(params, *args) * weights).sum()

        given = params, *map(np.asarray, args)
        if mesh is not None:
            placed = jax.device_put(params, meshes.parameter_sharding(mesh, params))
            given = placed, *jax.device_put(given[1:], meshes.batch_sharding(mesh))
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(*given))

    want, wanted = run(None)
    got, gradient = run(meshes.make_mesh(data=1, fsdp=4, tensor=2))
    assert abs(got - want) <= 2e-5 * abs(want)
    for path, g in wanted.items():
        bound = 2e-5 * max(np.abs(g).max(), 1e-6)
        np.testing.assert_allclose(gradient[path], g, atol=bound, err_msg=path)


def check_rules(model: Any, targets: tuple[str, ...]) -> None:
    """Compares what `meshes.RULES` says of paths with what the layers say of themselves."""
    model = lora.attach(model, rank=2, alpha=2, targets=targets, seed=0)
    found = set()
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear):
            name = ".".join(map(str, path))
            assert meshes.split_of(f"{name}.kernel") == layer.split, name
            found.add(layer.split)
    assert found == {"columns", "rows", "whole"}

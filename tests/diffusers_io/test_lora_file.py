"""LoRA files that other programs wrote, against the change that peft makes with them."""

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from dmpo_jax import diffusers_io
from dmpo_jax.diffusers_io import to_torch
from dmpo_jax.errors import UserError
from dmpo_jax.models import lora
from tests.support import torch_models

RANK, ALPHA = 2, 6
TARGETS = ["to_q", "to_out.0", "conv1"]


@pytest.fixture(scope="module")
def make():
    """Returns an adapted UNet of PyTorch's, every B drawn at random."""

    def made(**settings):
        unet = torch_models.unet("small")
        unet.add_adapter(peft.LoraConfig(r=RANK, target_modules=TARGETS, **settings))
        torch.manual_seed(0)
        for name, x in unet.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(x)
        return unet

    return made


def changes_of(unet):
    """{layer: change of its kernel} as peft computes it."""
    with torch.no_grad():
        return {
            name: module.get_delta_weight("default").numpy()
            for name, module in unet.named_modules()
            if isinstance(module, LoraLayer)
        }


def changes_in(folder):
    """{layer: change of its kernel} by the file that we read."""
    adapters = diffusers_io.load_lora(folder)
    found = {}
    for path, down in adapters.items():
        if ".lora_A." in path:
            layer = path.removesuffix(".lora_A.kernel")
            up = adapters[f"{layer}.lora_B.kernel"].reshape(down.shape[-1], -1)
            found[layer] = to_torch(f"{layer}.kernel", down @ up)
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for layer, x in wanted.items():
        np.testing.assert_allclose(found[layer], x, rtol=1e-5, atol=1e-5, err_msg=layer)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": RANK},
        {"lora_alpha": ALPHA, "alpha_pattern": {"conv1": 3}},
        {"lora_alpha": ALPHA, "use_rslora": True},
    ],
)
def test_what_diffusers_saved_is_read_with_its_scale(settings, make, tmp_path):
    unet = make(**settings)
    about = {k: getattr(unet.peft_config["default"], k) for k in ("r", "lora_alpha", *settings)}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=about,
    )
    assert_same(changes_in(tmp_path), changes_of(unet))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_dora_is_merged_as_peft_does(scale, make, tmp_path):
    unet = make(lora_alpha=ALPHA, use_dora=True)
    for name, x in unet.named_parameters():
        if "lora_magnitude_vector" in name:
            x.data *= torch.empty_like(x).uniform_(0.5, 2)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata={"r": RANK, "lora_alpha": ALPHA, "use_dora": True},
    )
    adapters = diffusers_io.load_lora(tmp_path)
    layers = {name: x for name, x in unet.named_modules() if isinstance(x, LoraLayer)}
    assert {f"{name}.{lora.MAGNITUDE}" for name in layers} < adapters.keys()
    kernels = {f"{name}.kernel": x.base_layer.weight.detach() for name, x in layers.items()}
    params = {p: jnp.asarray(diffusers_io.to_jax(p, x.numpy())) for p, x in kernels.items()}
    lora.fold_in(params, {path: jnp.asarray(x) for path, x in adapters.items()}, scale)
    for layer in layers.values():
        layer.scaling["default"] *= scale
        layer.merge()
    found = {
        path.removesuffix(".kernel"): to_torch(path, np.asarray(x)) for path, x in params.items()
    }
    assert_same(found, {name: x.base_layer.weight.detach().numpy() for name, x in layers.items()})


def test_names_of_scripts_and_alphas_beside_the_weights(make, tmp_path):
    unet = make(lora_alpha=RANK)
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    file = tmp_path / diffusers_io.LORA_FILE
    tensors = load_file(file)
    assert any(name.endswith(".lora.down.weight") for name in tensors)
    wanted = changes_of(unet)
    assert_same(changes_in(tmp_path), wanted)
    alphas = {f"unet.{layer}.alpha": torch.tensor(float(ALPHA)) for layer in wanted}
    save_file({**tensors, **alphas}, tmp_path / "own.safetensors")
    found = changes_in(tmp_path / "own.safetensors")
    assert_same(found, {layer: ALPHA / RANK * x for layer, x in wanted.items()})


def test_what_is_no_set_of_adapters_is_refused(make, tmp_path):
    file = tmp_path / "x.safetensors"
    down, up = torch.zeros(2, 8), torch.zeros(8, 3)
    pair = {"unet.a.lora_A.weight": down, "unet.a.lora_B.weight": torch.zeros(3, 2)}
    for tensors, words in (
        ({"unet.a.lora_A.weight": down}, "only a part of the adapter of a"),
        ({"unet.a.lora_A.weight": down, "unet.a.lora_B.weight": up}, "do not fit each other"),
        ({"unet.a.lora_A.weight": down, "unet.b.alpha": torch.ones(1)}, "only a part"),
        ({"unet.a.hada_w1_a": down}, "'unet.a.hada_w1_a'; only adapters of its unet"),
        ({"other.a.lora_A.weight": down}, "only adapters of its unet"),
        ({"unet.a.lora_magnitude_vector": torch.ones(3)}, "only a part of the adapter of a"),
        (
            {**pair, "unet.a.lora_magnitude_vector": torch.ones(4)},
            "a has 4 magnitudes of DoRA for 3 outputs",
        ),
        ({**pair, "unet.a.dora_scale": torch.ones(1, 8)}, r"shape \(1, 8\); DoRA is read with one"),
    ):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=words):
            diffusers_io.load_lora(file)


@pytest.mark.parametrize("said", ["{half", "[1]"])
def test_damaged_metadata_is_refused(said, tmp_path):
    file = tmp_path / "x.safetensors"
    pair = {"unet.a.lora_A.weight": torch.zeros(2, 8), "unet.a.lora_B.weight": torch.zeros(3, 2)}
    save_file(pair, file, metadata={"lora_adapter_metadata": said})
    with pytest.raises(UserError, match="is not a JSON object: copy it anew"):
        diffusers_io.load_lora(file)

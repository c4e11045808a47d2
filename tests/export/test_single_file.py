"""A checkpoint in one file, in the layout of Stable Diffusion's own repository, -> a folder."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmpo_jax import diffusers_io
from dmpo_jax.export.single_file import convert_single_file, pipeline_class
from tests.support import torch_pipelines

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def renamed(name: str, table: dict[str, str]) -> str:
    for new, old in table.items():
        if name.startswith(f"{new}."):
            return old + name.removeprefix(new)
    return name


def unet_name(name: str, layers: int = 1) -> str:
    """A UNet's name of ours as the first repository had it, for `layers` resnets a block."""
    ends = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    if (found := renamed(name, ends)) != name:
        return found
    kind, *rest = name.split(".")
    if kind == "mid_block":
        part, i, *tail = rest
        tail = renamed(".".join(tail), RESNET) if part == "resnets" else ".".join(tail)
        return f"middle_block.{2 * int(i) if part == 'resnets' else 1}.{tail}"
    block, part, i, *tail = rest
    tail = renamed(".".join(tail), RESNET) if part == "resnets" else ".".join(tail)
    if kind == "down_blocks":
        if part == "downsamplers":
            return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.{tail.replace('conv', 'op')}"
        at = int(block) * (layers + 1) + int(i) + 1
        return f"input_blocks.{at}.{int(part == 'attentions')}.{tail}"
    if part == "upsamplers":
        attends = int(block) == 0  # the torch pipelines' first up block has attention
        return f"output_blocks.{int(block) * (layers + 1) + layers}.{1 + attends}.{tail}"
    return f"output_blocks.{int(block) * (layers + 1) + int(i)}.{int(part == 'attentions')}.{tail}"


def vae_name(name: str, blocks: int = 3) -> str:
    side, *rest = name.split(".")
    if side not in ("encoder", "decoder"):
        return name
    tail = (
        ".".join(rest).replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    )
    if rest[0] == "mid_block":
        part, i, *tail = rest[1:]
        if part == "resnets":
            return f"{side}.mid.block_{int(i) + 1}." + ".".join(tail)
        return f"{side}.mid.attn_1." + renamed(".".join(tail), VAE_ATTENTION)
    if rest[0] in ("down_blocks", "up_blocks"):
        _, block, part, i, *tail = rest
        at, kind = (
            (int(block), "down") if rest[0] == "down_blocks" else (blocks - 1 - int(block), "up")
        )
        tail = ".".join(tail).replace("conv_shortcut", "nin_shortcut")
        if part == "resnets":
            return f"{side}.{kind}.{at}.block.{i}.{tail}"
        return f"{side}.{kind}.{at}.{'down' if kind == 'down' else 'up'}sample.{tail}"
    return f"{side}.{tail}"


def write_single_file(folder, file) -> None:
    tensors = {}
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, x in unet.items():
        tensors[f"model.diffusion_model.{unet_name(name)}"] = x
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    for name, x in vae.items():
        old = vae_name(name)
        pointwise = ".attn_1." in old and x.ndim == 2
        tensors[f"first_stage_model.{old}"] = x[:, :, None, None].contiguous() if pointwise else x
    text = load_file(folder / "text_encoder" / "model.safetensors")
    for name, x in text.items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"cond_stage_model.transformer.{name}"] = x
    save_file(tensors, file, {"format": "pt"})


def test_a_single_file_becomes_the_folder_it_came_from(tmp_path):
    torch_pipelines.write("sd15", tmp_path / "model")
    file = tmp_path / "model.safetensors"
    write_single_file(tmp_path / "model", file)
    convert_single_file(file, tmp_path / "out", like=str(tmp_path / "model"))
    for load in (diffusers_io.load_unet, diffusers_io.load_vae, diffusers_io.load_text_encoder):
        got, want = (diffusers_io.state_dict(load(tmp_path / x)) for x in ("out", "model"))
        assert set(got) == set(want)
        for name, array in want.items():
            np.testing.assert_array_equal(got[name].squeeze(), array.squeeze(), err_msg=name)
    assert diffusers_io.load_family(tmp_path / "out")[1].name == "sd"
    with pytest.raises(ValueError, match="holds a pipeline already"):
        convert_single_file(file, tmp_path / "out")


def test_the_class_is_read_off_the_file(tmp_path):
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for channels, xl, want in (
        (4, False, "StableDiffusionPipeline"),
        (4, True, "StableDiffusionXLPipeline"),
        (8, False, "StableDiffusionInstructPix2PixPipeline"),
        (9, True, "StableDiffusionXLInpaintPipeline"),
    ):
        tensors = {first: torch.zeros(8, channels, 3, 3)}
        if xl:
            tensors["conditioner.embedders.1.model.ln_final.weight"] = torch.zeros(2)
        save_file(tensors, tmp_path / "a.safetensors")
        assert pipeline_class(tmp_path / "a.safetensors") == want


def test_what_is_no_checkpoint_is_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no Stable Diffusion"):
        convert_single_file(tmp_path / "a.safetensors", tmp_path / "out")
    (tmp_path / "b.safetensors").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(ValueError, match=r"b\.safetensors cannot be read as safetensors"):
        convert_single_file(tmp_path / "b.safetensors", tmp_path / "out")
    with pytest.raises(ValueError, match="may be pickles"):
        convert_single_file(tmp_path / "model.ckpt", tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        convert_single_file(tmp_path / "c.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""PyTorch folders in and out, bit for bit: old ones, sharded ones, of two dtypes."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmpo_jax import diffusers_io
from dmpo_jax.models import parameters
from dmpo_jax.models.clip import CLIPTextModel
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.models.vae import AutoencoderKL
from dmpo_jax.parallel import meshes
from tests.support import torch_models
from tests.support.model_folders import (
    DTYPES,
    KINDS,
    UNET,
    VAE,
    assert_bitwise,
    load,
    reopen,
    save,
    shape_of,
    tiny_text,
    weight_file,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# --- there and back --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bit_exact(kind, dtype, tmp_path):
    theirs = KINDS[kind][0]().to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "in")
    ours = load(kind, tmp_path / "in", param_dtype=DTYPES[dtype])
    save(kind, ours, tmp_path / "out")
    assert_bitwise(
        load_file(weight_file(tmp_path / "out")), load_file(weight_file(tmp_path / "in"))
    )
    assert_bitwise(reopen(theirs, tmp_path / "out").state_dict(), theirs.state_dict())
    configs = [json.loads((tmp_path / x / "config.json").read_text()) for x in ("in", "out")]
    assert configs[0] == configs[1]
    assert shape_of(tmp_path / "out") == shape_of(tmp_path / "in")


def test_half_precision_files_widen_exactly_and_save_takes_a_dtype(tmp_path):
    theirs = KINDS["clip_l"][0]().half()
    theirs.save_pretrained(tmp_path / "in")
    ours = load("clip_l", tmp_path / "in")  # float32 parameters
    save("clip_l", ours, tmp_path / "wide")
    assert_bitwise(
        load_file(weight_file(tmp_path / "wide")),
        {k: v.float() for k, v in load_file(weight_file(tmp_path / "in")).items()},
    )
    save("clip_l", ours, tmp_path / "half", dtype=jnp.float16)
    assert_bitwise(
        load_file(weight_file(tmp_path / "half")), load_file(weight_file(tmp_path / "in"))
    )


def test_parameters_that_a_run_changed_are_what_is_saved(tmp_path):
    theirs = KINDS["vae"][0]()
    theirs.save_pretrained(tmp_path / "in")
    structure, params = parameters.split(load("vae", tmp_path / "in"))
    moved = parameters.merge(structure, {k: 2 * v for k, v in params.items()})
    save("vae", moved, tmp_path / "out")
    want = {k: 2 * v for k, v in theirs.state_dict().items()}
    assert_bitwise(reopen(theirs, tmp_path / "out").state_dict(), want)


# --- old folders -------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [True, False])
def test_clip_of_either_naming_keeps_it(prefix, tmp_path):
    """Folders from before transformers 5 have the prefix; before 4.31, a buffer too."""
    theirs = KINDS["clip_l"][0]()
    theirs.save_pretrained(tmp_path / "in")
    file = weight_file(tmp_path / "in")
    bare = {k.removeprefix("text_model."): v for k, v in load_file(file).items()}
    tensors = {f"text_model.{k}": v for k, v in bare.items()} if prefix else bare
    positions = torch.arange(16)[None]
    name = "text_model.embeddings.position_ids" if prefix else "embeddings.position_ids"
    save_file({**tensors, name: positions}, file, metadata={"format": "pt"})
    ours = load("clip_l", tmp_path / "in")
    save("clip_l", ours, tmp_path / "out")
    assert_bitwise(load_file(weight_file(tmp_path / "out")), tensors)
    assert_bitwise(reopen(theirs, tmp_path / "out").state_dict(), theirs.state_dict())


@pytest.mark.parametrize("pointwise", [False, True])
def test_vae_with_old_attention_names_keeps_them(pointwise, tmp_path):
    theirs = KINDS["vae"][0]()
    theirs.save_pretrained(tmp_path / "in")
    file = weight_file(tmp_path / "in")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, legacy in old.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{legacy}.")
                if pointwise and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None].contiguous()
        tensors[name] = tensor
    assert sum("proj_attn" in name for name in tensors) == 4  # encoder and decoder
    save_file(tensors, file, metadata={"format": "pt"})
    ours = load("vae", tmp_path / "in")
    structure, params = parameters.split(ours)  # as a run takes it apart and puts it together
    save("vae", parameters.merge(structure, params), tmp_path / "out")
    assert_bitwise(load_file(weight_file(tmp_path / "out")), tensors)
    if not pointwise:  # diffusers renames old names but never reshapes
        assert_bitwise(reopen(theirs, tmp_path / "out").state_dict(), theirs.state_dict())
    theirs.save_pretrained(tmp_path / "new")
    new = parameters.split(load("vae", tmp_path / "new"))[1]
    assert params.keys() == new.keys()
    assert all(np.array_equal(params[k], new[k]) for k in new)


@pytest.mark.parametrize("kind", ["vae", "clip_l"])
@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_variants(kind, variant, tmp_path):
    plain, other = KINDS[kind][0](0), KINDS[kind][0](1)
    plain.save_pretrained(tmp_path / "in")
    other.save_pretrained(tmp_path / "in", variant=variant)
    assert len(list((tmp_path / "in").glob("*.safetensors"))) == 2
    for wanted, v in ((plain, None), (other, variant)):
        save(kind, load(kind, tmp_path / "in", variant=v), tmp_path / "out")
        assert_bitwise(reopen(plain, tmp_path / "out").state_dict(), wanted.state_dict())
    for file in (tmp_path / "in").glob("*.safetensors"):
        if variant not in file.name:
            file.unlink()
    with pytest.raises(ValueError, match=rf"missing.*--config.model.variant={variant}$"):
        load(kind, tmp_path / "in")


@pytest.mark.parametrize(("kind", "variant"), [("unet", None), ("vae", "fp16"), ("bigg", "fp16")])
def test_shards_of_either_writer(kind, variant, tmp_path):
    theirs = KINDS[kind][0]()
    theirs.save_pretrained(tmp_path / "in", max_shard_size="30KB", variant=variant)
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    ours = load(kind, tmp_path / "in", variant=variant)
    save(kind, ours, tmp_path / "out", shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_bitwise(reopen(theirs, tmp_path / "out").state_dict(), theirs.state_dict())
    save(kind, load(kind, tmp_path / "out"), tmp_path / "out")  # whole again, shards gone
    assert len(shape_of(tmp_path / "out")) == 2
    assert_bitwise(reopen(theirs, tmp_path / "out").state_dict(), theirs.state_dict())
    next((tmp_path / "in").glob("*-00002-of-*")).unlink()
    with pytest.raises(ValueError, match=r"shards that are missing.*00002-of-"):
        load(kind, tmp_path / "in", variant=variant)


# --- configs old and new -----------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (UNet2DConditionModel, UNET),
        (UNet2DConditionModel, {**UNET, "addition_embed_type_num_heads": 64}),  # dead here
        (UNet2DConditionModel, {**UNET, "switch_of_2030": None, "another": False}),
        (AutoencoderKL, VAE),
        (AutoencoderKL, {**VAE, "force_upcast": True, "_name_or_path": "../vae"}),
        (CLIPTextModel, {"hidden_size": 8, "num_hidden_layers": 1, "torchscript": True}),
        (CLIPTextModel, {"num_hidden_layers": 1, "temperature": 1.0, "is_decoder": False}),
    ],
)
def test_dead_unset_and_absent_keys_are_accepted(make, config):
    parameters.initialise(make, config, 0)


def test_an_old_config_loads_and_is_given_back_as_it_was(tmp_path):
    """diffusers 0.1 wrote far fewer keys, and some that are gone."""
    (tmp_path / "in").mkdir()
    theirs = KINDS["unet"][0]()
    theirs.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    old = {k: v for k, v in config.items() if k in torch_models.UNET or k[0] == "_"}
    old |= {"act_fn": "silu", "center_input_sample": False, "mid_block_scale_factor": 1}
    (tmp_path / "in" / "config.json").write_text(json.dumps(old))
    diffusers_io.save_unet(diffusers_io.load_unet(tmp_path / "in"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == old
    assert_bitwise(reopen(theirs, tmp_path / "out").state_dict(), theirs.state_dict())


# --- dtypes, and parameters held apart --------------------------------------------------


def test_parameters_of_two_dtypes(tmp_path):
    """Kernels rounded to bfloat16 one by one, norms and biases as they are."""
    theirs = KINDS["unet"][0]()
    theirs.save_pretrained(tmp_path / "in")

    def held(path):
        return jnp.bfloat16 if path.endswith(".kernel") else jnp.float32

    ours = load("unet", tmp_path / "in", param_dtype=held)
    params = parameters.split(ours)[1]
    assert {path: x.dtype for path, x in params.items()} == {
        path: jnp.dtype(held(path)) for path in params
    }
    save("unet", ours, tmp_path / "out")
    kernels = {diffusers_io.torch_name(p) for p in params if p.endswith(".kernel")}
    want = {k: v.bfloat16() if k in kernels else v for k, v in theirs.state_dict().items()}
    assert_bitwise(load_file(weight_file(tmp_path / "out")), want)
    save("unet", ours, tmp_path / "wide", dtype=jnp.float32)
    want = {k: v.float() for k, v in want.items()}
    assert_bitwise(reopen(theirs, tmp_path / "wide").state_dict(), want)


def test_an_abstract_model_saves_parameters_in_the_layout_of_its_folder(tmp_path):
    """A run exports so: the structure, the old names, and its own parameters."""
    diffusers_io.save_text_encoder(tiny_text(1.0), tmp_path / "in")
    file = weight_file(tmp_path / "in")
    bare = {k.removeprefix("text_model."): v.clone() for k, v in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    sharding = functools.partial(meshes.parameter_sharding, meshes.make_mesh(data=1, fsdp=8))
    params = parameters.split(load("clip_l", tmp_path / "in", sharding=sharding))[1]
    moved = {path: 2 * x for path, x in params.items()}
    abstract = load("clip_l", tmp_path / "in", abstract=True)
    assert parameters.shapes(abstract) == parameters.shapes(load("clip_l", tmp_path / "in"))
    save("clip_l", abstract, tmp_path / "out", params=moved)
    assert_bitwise(load_file(weight_file(tmp_path / "out")), {k: 2 * v for k, v in bare.items()})
    save("clip_l", abstract, tmp_path / "host", params={k: np.asarray(v) for k, v in moved.items()})
    assert weight_file(tmp_path / "host").read_bytes() == weight_file(tmp_path / "out").read_bytes()
    before = shape_of(tmp_path / "out")
    first = next(iter(moved))
    for wrong in ({**moved, "x.bias": 0}, {**moved, first: np.zeros(3)}, {}):
        with pytest.raises(
            ValueError, match=r"paths and shapes of the CLIPTextModel, but \d+ differ"
        ):
            save("clip_l", abstract, tmp_path / "out", params=wrong)
    assert shape_of(tmp_path / "out") == before

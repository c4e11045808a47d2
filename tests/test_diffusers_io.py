"""PyTorch folders in and out, bit for bit; old folders, broken folders, killed saves."""

import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from safetensors.torch import load_file, save_file

import torch_models
from dmpo_jax import diffusers_io
from dmpo_jax.models import parameters
from dmpo_jax.models.clip import CLIPTextModel
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.models.vae import AutoencoderKL

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

KINDS = {  # kind -> (a PyTorch model, load, save)
    "unet": (lambda s=0: torch_models.unet("small", s), "unet"),
    "vae": (lambda s=0: torch_models.vae("sdxl", s), "vae"),
    "clip_l": (lambda s=0: torch_models.clip("clip_l", s), "text_encoder"),
    "bigg": (lambda s=0: torch_models.clip("bigg", s), "text_encoder"),
}
DTYPES = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}


def load(kind, folder, **kw):
    return getattr(diffusers_io, f"load_{KINDS[kind][1]}")(folder, **kw)


def save(kind, model, folder, **kw):
    getattr(diffusers_io, f"save_{KINDS[kind][1]}")(model, folder, **kw)


def reopen(theirs, folder):
    """The folder as PyTorch opens it, in the dtype of `theirs`."""
    name = "dtype" if hasattr(theirs.config, "model_type") else "torch_dtype"
    return type(theirs).from_pretrained(folder, **{name: theirs.dtype})


def assert_bitwise(got, want):
    """Two dicts of tensors: the same names, shapes, dtypes and bits."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def weight_file(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def edit_json(path, **changes):
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def shape_of(folder):
    return sorted(p.name for p in folder.iterdir())


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
    with pytest.raises(ValueError, match=rf"(?s)missing.*{variant}\.safetensors.*variant="):
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


# --- folders that do not fit -------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_text():
    """(config, a function that makes a text encoder of ours filled with one number)."""
    config = {**torch_models.CLIP, "hidden_size": 8, "intermediate_size": 8, "projection_dim": 8}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "architectures": ["CLIPTextModel"]}
    return lambda value, **changes: filled(CLIPTextModel, config | changes, value)


def filled(make, config, value):
    structure, params = parameters.split(parameters.initialise(make, config, 0))
    return parameters.merge(structure, {k: jnp.full_like(v, value) for k, v in params.items()})


@pytest.fixture
def folder(tiny_text, tmp_path):
    diffusers_io.save_text_encoder(tiny_text(1.0), tmp_path / "text")
    return tmp_path / "text"


def test_one_error_names_every_tensor_that_does_not_fit(folder):
    tensors = load_file(weight_file(folder))
    layer = "text_model.encoder.layers.0."
    del tensors[layer + "mlp.fc1.weight"], tensors[layer + "mlp.fc2.bias"]
    tensors |= {"extra.weight": torch.zeros(2), "logit_scale": torch.zeros(())}
    tensors[layer + "self_attn.q_proj.weight"] = torch.zeros(8, 3)
    save_file(tensors, weight_file(folder))
    with pytest.raises(ValueError) as error:
        diffusers_io.load_text_encoder(folder)
    missing, rest = str(error.value).split("Unexpected: ")
    unexpected, misshapen = rest.split("Misshapen: ")
    assert f"['{layer}mlp.fc1.weight', '{layer}mlp.fc2.bias']" in missing
    assert "['extra.weight', 'logit_scale']" in unexpected
    assert f"{layer}self_attn.q_proj.weight has (8, 3), config.json says (8, 8)" in misshapen


def test_a_pickle_is_refused_with_words(folder):
    weight_file(folder).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*never opened.*safe_serialization"):
        diffusers_io.load_text_encoder(folder)


def test_a_truncated_file_is_a_readable_error(folder):
    file = weight_file(folder)
    content = file.read_bytes()
    for size in (0, 4, 100, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
            diffusers_io.load_text_encoder(folder)


@pytest.mark.parametrize("content", ["{", "", "[1, 2]"])
def test_invalid_json_names_the_file(content, folder):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json .*JSON"):
        diffusers_io.load_text_encoder(folder)


def test_missing_folders_and_parts_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        diffusers_io.load_unet(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="lacks its 'unet' part"):
        diffusers_io.load_unet(tmp_path)
    with pytest.raises(ValueError, match="lacks its 'text_encoder_2' part"):
        diffusers_io.load_text_encoder(tmp_path, subfolder="text_encoder_2")
    with pytest.raises(ValueError, match=r"scheduler_config\.json is missing"):
        diffusers_io.load_pipeline(tmp_path)


def test_unsupported_classes_are_named(folder, tmp_path):
    edit_json(folder / "config.json", architectures=["T5EncoderModel"])
    with pytest.raises(ValueError, match=r"T5EncoderModel; supported text encoders: .*CLIPText"):
        diffusers_io.load_text_encoder(folder)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match=r"FluxPipeline; supported pipelines: .*StableDiffusionXL"):
        diffusers_io.load_pipeline(tmp_path)
    with pytest.raises(ValueError, match="FluxPipeline"):
        diffusers_io.make_index("FluxPipeline", {})


# --- configs old and new -----------------------------------------------------------

UNET = {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
VAE = {"block_out_channels": [8], "norm_num_groups": 4, "mid_block_add_attention": False}


def test_config_keys_that_would_change_the_result_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(UNET))
    edit_json(
        tmp_path / "config.json",
        class_embed_type="timestep",
        only_cross_attention=[True],
        brand_new_switch=3,
        downsample_padding=2,
    )
    with pytest.raises(ValueError) as error:
        diffusers_io.load_unet(tmp_path)
    for key in ("class_embed_type='timestep'", "brand_new_switch=3", "downsample_padding=2"):
        assert key in str(error.value)
    assert "only_cross_attention=[True] (supported: False)" in str(error.value)


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


# --- killed saves ------------------------------------------------------------------


class Killed(Exception):
    """Stands for the process dying."""


WRITES = ("write_bytes", "write_text", "replace", "unlink", "copy", "rmtree", "mkdir")


def kill_at(monkeypatch, k):
    """The k-th change of the file system dies half way, and so does every later one."""
    kind, count = type(epath.Path("/")), [0]

    def dying(name):
        original = getattr(kind, name)

        @functools.wraps(original)
        def call(self, *args, **kw):
            count[0] += 1
            if count[0] <= k:
                return original(self, *args, **kw)
            if count[0] == k + 1 and name in ("write_bytes", "write_text"):
                original(self, args[0][: len(args[0]) // 2])
            elif count[0] == k + 1 and name == "copy":
                epath.Path(args[0]).write_bytes(self.read_bytes()[: self.stat().length // 2])
            raise Killed

        return call

    for name in WRITES:
        monkeypatch.setattr(kind, name, dying(name))


def values(model) -> set:
    """Every number that a model of ours holds, and the activation that its config names."""
    numbers = {float(v) for x in parameters.split(model)[1].values() for v in np.unique(x)}
    return numbers | ({model.config.hidden_act} if "hidden_act" in model.config else set())


def loaded(load, folder):
    """The numbers that the folder's model holds; None where it refuses to load."""
    try:
        return values(load(folder))
    except ValueError:
        return None


def kill_everywhere(monkeypatch, save, check) -> int:
    """`save()` killed at each change in turn, `check(k)` after each; how many there were."""
    for k in range(200):
        with monkeypatch.context() as patch:
            kill_at(patch, k)
            try:
                save(k)
            except Killed:
                done = False
            else:
                done = True
        check(k, done)
        if done:
            return k
    raise AssertionError("the save never ended")


WHOLE, SHARDS = 2**30, 1000


@pytest.mark.parametrize("after", [WHOLE, SHARDS])
@pytest.mark.parametrize("before", [WHOLE, SHARDS])
def test_a_killed_save_never_mixes_weights(before, after, tiny_text, tmp_path, monkeypatch):
    """`before` and `after`: bytes a shard of what was there and of what replaces it."""
    old, new = tiny_text(1.0), tiny_text(2.0, hidden_act="gelu")
    seen, is_old, is_new = [], {1.0, "quick_gelu"}, {2.0, "gelu"}

    def save(k):
        out = tmp_path / str(k)
        diffusers_io.save_text_encoder(new, out, shard_bytes=after)

    def check(k, done):
        out = tmp_path / str(k)
        seen.append(loaded(diffusers_io.load_text_encoder, out))
        assert seen[-1] in (is_old, is_new, None)
        assert not done or seen[-1] == is_new
        diffusers_io.save_text_encoder(new, out, shard_bytes=after)  # and a second try heals it
        assert not list(out.glob("*.part"))
        diffusers_io.save_text_encoder(old, tmp_path / str(k + 1), shard_bytes=before)

    diffusers_io.save_text_encoder(old, tmp_path / "0", shard_bytes=before)
    assert kill_everywhere(monkeypatch, save, check) >= 6
    assert seen[0] == is_old
    assert None in seen


def make_pipeline(folder, value, index):
    """A pipeline folder whose every number is `value`."""
    diffusers_io.save_unet(filled(UNet2DConditionModel, UNET, value), folder / "unet")
    vae = filled(AutoencoderKL, VAE, value)
    diffusers_io.save_vae(vae, folder / "vae", shard_bytes=10_000 if value == 2.0 else 2**30)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_killed_pipeline_save_never_passes_for_whole(tmp_path, monkeypatch):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "x"]}
    make_pipeline(tmp_path / "source", 2.0, index)
    make_pipeline(tmp_path / "old", 1.0, {**index, "old": True})
    unet = filled(UNet2DConditionModel, UNET, 3.0)

    def save(k):
        diffusers_io.save_pipeline(unet, tmp_path / "source", tmp_path / str(k))

    def check(k, done):
        out = tmp_path / str(k)
        whole = (out / "model_index.json").exists()
        parts = [loaded(diffusers_io.load_unet, out), loaded(diffusers_io.load_vae, out)]
        assert parts[0] in ({1.0}, {3.0}, None)
        assert parts[1] in ({1.0}, {2.0}, None)
        if whole:
            old = json.loads((out / "model_index.json").read_text()).get("old", False)
            assert parts == ([{1.0}, {1.0}] if old else [{3.0}, {2.0}])
        else:
            with pytest.raises(ValueError, match=r"model_index\.json is missing"):
                diffusers_io.load_pipeline(out)
        assert not done or (whole and not old)
        shutil.copytree(tmp_path / "old", tmp_path / str(k + 1))

    shutil.copytree(tmp_path / "old", tmp_path / "0")
    assert kill_everywhere(monkeypatch, save, check) >= 12


def test_a_pipeline_replaces_what_another_left(tmp_path):
    """The target's own files would be found before the copied ones."""
    index = {"_class_name": "StableDiffusionPipeline"}
    make_pipeline(tmp_path / "source", 2.0, index)
    make_pipeline(tmp_path / "out", 1.0, index)
    unet = filled(UNet2DConditionModel, UNET, 3.0)
    diffusers_io.save_pipeline(unet, tmp_path / "source", tmp_path / "out")
    assert shape_of(tmp_path / "out" / "vae") == shape_of(tmp_path / "source" / "vae")
    assert values(diffusers_io.load_vae(tmp_path / "out")) == {2.0}
    assert values(diffusers_io.load_unet(tmp_path / "out")) == {3.0}
    # In place: the UNet alone changes.
    diffusers_io.save_pipeline(unet, tmp_path / "source", tmp_path / "source")
    assert values(diffusers_io.load_vae(tmp_path / "source")) == {2.0}
    assert values(diffusers_io.load_unet(tmp_path / "source")) == {3.0}
    assert json.loads((tmp_path / "source" / "model_index.json").read_text()) == index


def test_a_source_without_index_leaves_the_target_alone(tmp_path):
    make_pipeline(tmp_path / "out", 1.0, {"_class_name": "StableDiffusionPipeline"})
    (tmp_path / "source").mkdir()
    before = shape_of(tmp_path / "out")
    with pytest.raises(ValueError, match=r"model_index\.json is missing"):
        diffusers_io.save_pipeline(None, tmp_path / "source", tmp_path / "out")
    assert shape_of(tmp_path / "out") == before

"""Folders that cannot be what they say: one line each, naming the file or the key."""

import json
import pickle
import re

import pytest
import torch
from etils import epath
from safetensors.torch import load_file, save_file

from dmpo_jax import diffusers_io
from dmpo_jax.diffusers_io.pipeline import load_tokenizer
from dmpo_jax.models.clip import CLIPTextModel
from tests.support.model_folders import UNET, VAE, edit_json, filled, tiny_text, weight_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def refusal(load, *args, **kw) -> str:
    """Returns the error message of loading: one line of readable length."""
    with pytest.raises(ValueError) as error:
        load(*args, **kw)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.fixture
def folder(tmp_path):
    diffusers_io.save_text_encoder(tiny_text(1.0), tmp_path / "text")
    return tmp_path / "text"


def test_one_error_names_every_tensor_that_does_not_fit(folder):
    tensors = load_file(weight_file(folder))
    layer = "text_model.encoder.layers.0."
    del tensors[layer + "mlp.fc1.weight"], tensors[layer + "mlp.fc2.bias"]
    tensors |= {"extra.weight": torch.zeros(2), "logit_scale": torch.zeros(())}
    tensors[layer + "self_attn.q_proj.weight"] = torch.zeros(8, 3)
    save_file(tensors, weight_file(folder))
    message = refusal(diffusers_io.load_text_encoder, folder)
    assert f"2 missing: {layer}mlp.fc1.weight, {layer}mlp.fc2.bias;" in message
    assert "2 unexpected: extra.weight, logit_scale;" in message
    wrong = f"{layer}self_attn.q_proj.weight has (8, 3), config.json says (8, 8)"
    assert f"1 misshapen: {wrong}." in message


def test_many_tensors_that_do_not_fit_are_counted(folder):
    """The width of another model: nearly every tensor is misshapen."""
    count = len(load_file(weight_file(folder)))
    edit_json(folder / "config.json", hidden_size=16, num_hidden_layers=40)
    message = refusal(diffusers_io.load_text_encoder, folder)
    assert re.search(r"624 missing: text_model[^;]* and 620 more;", message)
    assert re.search(rf"{count - 1} misshapen: text_model[^;]* and {count - 5} more\.", message)


def test_a_pickle_is_refused_with_words(folder):
    weight_file(folder).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"(?s)pytorch_model\.bin.*never opened.*save_pretrained"):
        diffusers_io.load_text_encoder(folder)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ("export/model_index.json", r"is a run's folder; its pipeline is .*/run/export: give that"),
        ("checkpoints/4/state", r"without a pipeline yet: dmpo-jax convert --checkpoint=.*/run "),
    ],
)
def test_a_run_in_place_of_a_model_names_its_pipeline(tmp_path, made, says):
    for name in ("config.json", made):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("{}")
    for load in (diffusers_io.load_family, diffusers_io.load_model, diffusers_io.load_unet):
        with pytest.raises(ValueError, match=says):
            load(tmp_path / "run")


def test_a_truncated_file_is_a_readable_error(folder):
    file = weight_file(folder)
    content = file.read_bytes()
    for size in (0, 4, 100, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
            diffusers_io.load_text_encoder(folder)


def test_a_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    message = refusal(diffusers_io.load_text_encoder, sharded)
    assert f"{shard} cannot be read as safetensors" in message


@pytest.mark.parametrize("protocol", ["zip", 2, 4])
def test_a_pickle_that_bears_the_name_is_refused_and_never_opened(protocol, folder):
    file = weight_file(folder)
    if protocol == "zip":
        torch.save({"weight": torch.zeros(2)}, file)
    else:
        file.write_bytes(pickle.dumps(Trap(), protocol))
    message = refusal(diffusers_io.load_text_encoder, folder)
    assert f"{file} cannot be read as safetensors" in message
    assert "it is a pickle: save it again with safe_serialization=True" in message


class Trap:
    def __reduce__(self):
        return pytest.fail, ("the pickle was opened",)


@pytest.fixture
def sharded(tmp_path):
    diffusers_io.save_text_encoder(tiny_text(1.0), tmp_path / "sharded", shard_bytes=400)
    return tmp_path / "sharded"


def test_an_index_that_does_not_fit_its_shards_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    weight_map = json.loads(index.read_text())["weight_map"]
    moved = next(name for name, shard in weight_map.items() if shard == first.name)

    edit_json(index, weight_map=weight_map | {moved: second.name})
    message = refusal(diffusers_io.load_text_encoder, sharded)
    assert f"{second} lacks 1 tensors that the index says it holds: {moved};" in message

    edit_json(index, weight_map=weight_map | {"ghost.weight": first.name})
    message = refusal(diffusers_io.load_text_encoder, sharded)
    assert f"{first} lacks 1 tensors that the index says it holds: ghost.weight;" in message

    edit_json(index, weight_map=weight_map)
    held = {name: tensor.clone() for name, tensor in load_file(second).items()}  # unmapped
    save_file(held | {moved: torch.zeros(2)}, second)
    message = refusal(diffusers_io.load_text_encoder, sharded)
    assert f"{second} holds 1 tensors that another shard holds too: {moved};" in message

    for broken in (None, [], {"a": 3}, {"a": "../elsewhere.safetensors"}, {"a": "model.bin"}):
        edit_json(index, weight_map=broken)
        message = refusal(diffusers_io.load_text_encoder, sharded)
        assert f"{index} should map tensors to .safetensors files" in message


def test_missing_shards_are_counted(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 6
    for shard in shards[1:7]:
        shard.unlink()
    message = refusal(diffusers_io.load_text_encoder, sharded)
    assert f"names 6 shards that are missing: {shards[1].name}, " in message
    assert "and 2 more" in message


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", "[" * 100_000])
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


def test_a_hub_that_cannot_be_reached_takes_one_line(monkeypatch):
    def unreachable(*args, **kw):
        raise OSError("401 Client Error.\n\n" + 90 * "Repository Not Found for url.\n")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = refusal(diffusers_io.load_unet, "nobody/nothing")
    assert "'nobody/nothing' is no local folder, and fetching it as a hub id failed: 401" in message


def test_unsupported_classes_are_named(folder, tmp_path):
    edit_json(folder / "config.json", architectures=["BertModel"])
    with pytest.raises(ValueError, match=r"BertModel; supported text encoders: .*CLIPText"):
        diffusers_io.load_text_encoder(folder)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match=r"FluxPipeline; supported pipelines: .*StableDiffusionXL"):
        diffusers_io.load_pipeline(tmp_path)
    with pytest.raises(ValueError, match="FluxPipeline"):
        diffusers_io.make_index("FluxPipeline", {})


def test_config_keys_that_would_change_the_result_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(UNET))
    edit_json(
        tmp_path / "config.json",
        class_embed_type="timestep",
        only_cross_attention=[True],
        brand_new_switch=3,
        downsample_padding=2,
    )
    message = refusal(diffusers_io.load_unet, tmp_path)
    assert str(tmp_path / "config.json") in message
    for key in ("class_embed_type='timestep'", "brand_new_switch=3", "downsample_padding=2"):
        assert key in message
    assert "only_cross_attention=[True] (supported: False)" in message


@pytest.mark.parametrize(
    ("load", "config", "change", "words"),
    [
        ("unet", UNET, {"block_out_channels": "wide"}, "block_out_channels='wide'"),
        ("unet", UNET, {"block_out_channels": 320}, "block_out_channels=320"),
        ("unet", UNET, {"norm_num_groups": "4"}, "norm_num_groups='4'"),
        ("unet", UNET, {"flip_sin_to_cos": 1}, "flip_sin_to_cos=1"),
        ("unet", UNET, {"norm_num_groups": 3}, "norm_num_groups=3 .*8 channels"),
        ("unet", UNET, {"attention_head_dim": 3}, "attention_head_dim=3 .*8 channels"),
        ("unet", UNET, {"attention_head_dim": [2, 2]}, "attention_head_dim needs .* 1 "),
        ("unet", UNET, {"act_fn": "sigmoid"}, "act_fn='sigmoid'"),
        ("unet", UNET, {"norm_num_groups": None}, "Type.*Error"),
        ("vae", VAE, {"norm_num_groups": 3}, "norm_num_groups=3 .*8 channels"),
        ("vae", VAE, {"scaling_factor": "0.18"}, "scaling_factor='0.18'"),
        ("text_encoder", {}, {"num_attention_heads": 7}, "num_attention_heads=7 .*512 channels"),
        ("text_encoder", {}, {"hidden_size": 8.5}, "hidden_size=8.5"),
        ("text_encoder", {}, {"num_hidden_layers": 10**7}, "=10000000 .*512 layers at most"),
        ("unet", UNET, {"layers_per_block": 10**6}, "layers_per_block=1000000"),
        ("unet", UNET, {"transformer_layers_per_block": [[10**6]]}, "512 layers at most"),
        ("unet", UNET, {"block_out_channels": [8] * 10**5}, r"block_out_channels=\[8, .*\.\.\. "),
    ],
)
def test_values_that_make_no_model_are_refused(load, config, change, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    message = refusal(getattr(diffusers_io, f"load_{load}"), tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'} describes no model: ")
    assert re.search(words, message), message


def test_values_that_make_no_noise_are_refused(tmp_path):
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    for key, value in {
        "num_train_timesteps": 10**9,
        "beta_start": None,
        "beta_end": "much",
        "beta_schedule": "steep",
        "prediction_type": "noise",
        "trained_betas": [{}],
    }.items():
        file.write_text(json.dumps({key: value}))
        assert str(file) in refusal(diffusers_io.load_schedule, tmp_path), key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(value, dtype, folder):
    tensors = {name: x.to(dtype) for name, x in load_file(weight_file(folder)).items()}
    name = "text_model.final_layer_norm.bias"
    tensors[name] = tensors[name].clone().index_fill(0, torch.tensor([1]), value)
    save_file(tensors, weight_file(folder))
    for held in ("float32", "bfloat16"):
        message = refusal(diffusers_io.load_text_encoder, folder, param_dtype=held)
        assert f"{weight_file(folder)} holds values in {name} that are not finite" in message


def test_large_weights_are_finite(folder):
    """Their sum is not, in float32."""
    save_file({k: x * 3e38 for k, x in load_file(weight_file(folder)).items()}, weight_file(folder))
    diffusers_io.load_text_encoder(folder)


def test_a_class_that_is_no_name_is_refused(folder, tmp_path):
    for value in ([["a"]], {"a": 1}, 5):
        edit_json(folder / "config.json", architectures=value)
        assert "supported text encoders" in refusal(diffusers_io.load_text_encoder, folder)
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": value}))
        assert "supported pipelines" in refusal(diffusers_io.load_family, tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text("{}")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).write_text("no JSON")
    message = refusal(load_tokenizer, epath.Path(tmp_path), "tokenizer")
    assert message.startswith(f"{folder} holds no valid tokenizer: ")


# --- parts of different models -----------------------------------------------------

SDXL_UNET = {
    **UNET,
    "cross_attention_dim": 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
}
SECOND = {"hidden_size": 16, "projection_dim": 16, "architectures": ["CLIPTextModelWithProjection"]}


def write_parts(folder, kind, unet, *texts):
    """A pipeline folder of config.json files alone: it must be refused before any weight."""
    for name, config in {"unet": unet, "text_encoder": texts[0], "scheduler": {}}.items():
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(config))
    for text in texts[1:]:
        (folder / "text_encoder_2").mkdir()
        (folder / "text_encoder_2" / "config.json").write_text(json.dumps(text))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))


@pytest.mark.parametrize(
    ("unet", "texts", "words"),
    [
        (UNET, [{"hidden_size": 16}], r"width 8 \(cross_attention_dim\).*give 16 \(hidden_size\)"),
        (UNET, [{}], r"give 512 \(hidden_size\)"),  # the library's default
        (SDXL_UNET, [{"hidden_size": 8}, SECOND | {"hidden_size": 8}], r"width 24 .*give 8 \+ 8 "),
        (
            SDXL_UNET,
            [{"hidden_size": 8}, SECOND | {"architectures": ["CLIPTextModel"]}],
            r"text_encoder_2 has no projection.*\['CLIPTextModel'\].*WithProjection",
        ),
        (
            SDXL_UNET,
            [{"hidden_size": 8}, SECOND | {"projection_dim": 32}],
            r"width 16, but text_encoder_2 projects to 32",
        ),
    ],
)
def test_text_encoders_of_another_model_are_refused(unet, texts, words, tmp_path):
    kind = "StableDiffusionPipeline" if len(texts) == 1 else "StableDiffusionXLPipeline"
    write_parts(tmp_path, kind, unet, *texts)
    assert re.search(words, refusal(diffusers_io.load_pipeline, tmp_path))


@pytest.mark.parametrize(
    ("unet", "texts"),
    [
        (UNET, [{"hidden_size": 8}]),
        (UNET | {"cross_attention_dim": [8]}, [{"hidden_size": 8}]),
        (SDXL_UNET, [{"hidden_size": 8}, SECOND]),
    ],
)
def test_text_encoders_that_fit_pass_on_to_the_tokenizers(unet, texts, tmp_path):
    kind = "StableDiffusionPipeline" if len(texts) == 1 else "StableDiffusionXLPipeline"
    write_parts(tmp_path, kind, unet, *texts)
    assert "lacks its 'tokenizer' part" in refusal(diffusers_io.load_pipeline, tmp_path)


def test_a_second_encoder_whose_file_lacks_the_projection_is_named(tmp_path):
    text = {"hidden_size": 8, "num_hidden_layers": 1, "projection_dim": 8, "vocab_size": 9}
    diffusers_io.save_text_encoder(filled(CLIPTextModel, text, 1.0), tmp_path / "text_encoder_2")
    edit_json(
        tmp_path / "text_encoder_2" / "config.json", architectures=["CLIPTextModelWithProjection"]
    )
    message = refusal(diffusers_io.load_text_encoder, tmp_path, subfolder="text_encoder_2")
    assert "1 missing: text_projection.weight." in message

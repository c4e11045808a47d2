"""Every supported pipeline, from a folder of PyTorch's to one that PyTorch opens again."""

import contextlib
import dataclasses
import gc
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from etils import epath
from PIL import Image

from dmpo_jax import diffusers_io, families
from dmpo_jax.data import sources
from dmpo_jax.data.encoded import records
from dmpo_jax.data.encoded.meta import EncodedMeta
from dmpo_jax.encoding.pixels import load_pixels
from dmpo_jax.families import editing
from dmpo_jax.jobs.run import run
from dmpo_jax.models import parameters
from dmpo_jax.toy import debug
from dmpo_jax.training.build import check_fits
from tests.support import tiny, torch_pipelines

ROOT = pathlib.Path(__file__).parents[2]
SIDE, STEPS = torch_pipelines.SIDE, 3


@pytest.fixture(autouse=True)
def _collect():
    yield
    gc.collect()


def png(array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count=24, side=SIDE):
    """Pairs of noise with all that any family asks for, at the models' resolution."""
    rng = np.random.default_rng(0)
    made = debug.synthetic_pairs(count, given=("source", "mask"))
    for row in made:
        for name in ("jpg_0", "jpg_1", "jpg_source"):
            row[name] = png(rng.integers(0, 256, (side, side, 3), np.uint8))
        row["mask"] = png(np.uint8(255 * (rng.random((side, side)) < 0.5)))
    return made


def leaves(model, source) -> dict:
    """Three updates, encoding before them; nothing else."""
    return {
        "model__folder": model,
        "data__encoded": "",
        "data__source": f"pickapic:{source}",
        "data__validation_fraction": 0.0,
        "jobs": ("encode", "train"),
        "train__steps": STEPS,
        "log__validate_every": 0,
        "log__checkpoint_every": STEPS,
        "optimizer__warmup_steps": 0,
    }


def train_here(model, source, workdir, monkeypatch):
    run(tiny.make_config("", "", **leaves(model, source)), workdir)


def train_by_command(model, source, workdir, monkeypatch):
    """As people do, on one device, the step compiled as it always is."""
    given = {**leaves(model, source), "jobs": "encode,train"}
    config = tiny.make_config("", "")
    base = {"model__compute_dtype": "float32", "train__batch_size": 8, "log__every": 1}
    given |= base | {"optimizer__learning_rate": config.optimizer.learning_rate}
    given |= {"data__num_threads": 1, "log__sample_every": 0}
    flags = [f"--config.{k.replace('__', '.')}={v}" for k, v in given.items()]
    done = subprocess.run(
        [
            sys.executable,
            "launch/train.py",
            "--config=configs/sd15_dmpo.py",
            f"--workdir={workdir}",
            *flags,
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


SLOW = [
    pytest.param(n, train_by_command, marks=pytest.mark.slow) for n in torch_pipelines.PIPELINES
]
FAST = [
    ("sd_inpaint", train_here),
    pytest.param("legacy", train_here, marks=pytest.mark.slow),
]


# Of folders before 0.9, diffusers expects latents of 64; and its Euler scheduler's arrays.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The configuration file of the unet:FutureWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("name", "train_it"), FAST + SLOW)
def test_from_pytorch_and_back(name, train_it, tmp_path, monkeypatch):
    model = torch_pipelines.write(name, tmp_path / "model")
    pairs = rows()
    sources.write_pick_a_pic(tmp_path / "pairs.parquet", pairs)
    workdir = tmp_path / "run"
    train_it(model, tmp_path / "pairs.parquet", workdir, monkeypatch)

    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    if train_it is train_by_command:
        assert metrics[0]["margin_abs_max"] == 0
        assert metrics[-1]["margin_abs_max"] > 0
    assert_only_the_unet_changed(pathlib.Path(model), workdir / "export")
    kind = getattr(diffusers, torch_pipelines.PIPELINES[name][0])
    pipeline = kind.from_pretrained(workdir / "export")
    assert type(pipeline).__name__ == torch_pipelines.PIPELINES[name][0]
    assert_same_conditioning(pipeline, workdir / "encoded", pairs[0], monkeypatch)
    assert_same_unet(pipeline, workdir / "export")


def assert_only_the_unet_changed(before: pathlib.Path, after: pathlib.Path):
    files = {p.relative_to(before) for p in before.rglob("*") if p.is_file()}
    kept = {p for p in files if p.parts[0] not in ("unet", "model_index.json")}
    assert len(kept) > 5
    added = {pathlib.Path(name) for name in ("README.md", "export.json")}
    assert {p.relative_to(after) for p in after.rglob("*") if p.is_file()} == files | added
    for path in kept:
        assert (before / path).read_bytes() == (after / path).read_bytes(), path
    for path in ("model_index.json", "unet/config.json"):
        assert json.loads((before / path).read_text()) == json.loads((after / path).read_text())
    old, new = (diffusers_io.state_dict(diffusers_io.load_unet(f)) for f in (before, after))
    assert all(not np.array_equal(old[name], new[name]) for name in old)


class SeenError(Exception):
    pass


def take_the_mean(monkeypatch):
    """Of the VAE's posterior, from which PyTorch's inpainting draws."""
    drawn = lambda self, generator=None: self.mean  # noqa: E731
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", drawn)


def unet_call(pipeline, monkeypatch, **given) -> dict:
    """Returns the arguments of PyTorch's UNet at the first step, for a batch of one."""
    seen = {}

    def forward(sample, timestep, **kw):
        seen.update(kw, sample=sample)
        raise SeenError

    take_the_mean(monkeypatch)
    monkeypatch.setattr(pipeline.unet, "forward", forward)
    with contextlib.suppress(SeenError), torch.no_grad():
        pipeline.set_progress_bar_config(disable=True)
        pipeline(guidance_scale=1.0, num_inference_steps=2, **given)
    monkeypatch.undo()
    return seen


def assert_same_conditioning(pipeline, encoded, row, monkeypatch):
    """Our first record, and its prompt, against what PyTorch makes of the same row."""
    pairs = records.open_pairs(encoded)
    record = pairs.split("train")[0]
    prompt = pairs.prompts[record.prompt]
    assert prompt.text == row["caption"]
    given = {"prompt": row["caption"]}
    if kind := pairs.meta.image_kind:
        given["image"] = Image.open(io.BytesIO(row["jpg_source"]))
    else:
        given |= {"height": SIDE, "width": SIDE}
    if kind == "inpaint":
        given |= {"mask_image": Image.open(io.BytesIO(row["mask"])), "strength": 1.0}
        given |= {"height": SIDE, "width": SIDE}
    call = unet_call(pipeline, monkeypatch, **given)
    close = {"atol": 2e-3, "rtol": 2e-3}  # stored in float16
    np.testing.assert_allclose(prompt.context, call["encoder_hidden_states"][0], **close)
    if prompt.pooled is not None:
        added = call["added_cond_kwargs"]
        np.testing.assert_allclose(prompt.pooled, added["text_embeds"][0], **close)
        np.testing.assert_array_equal(record.sizes[0], added["time_ids"][0])
    beside = call["sample"][0, 4:].permute(1, 2, 0).numpy()
    if kind:
        np.testing.assert_allclose(record.image, beside, **close)
        assert np.abs(beside).max() > 0.1
    else:
        assert record.image is None
        assert beside.shape[-1] == 0


def assert_same_unet(pipeline, folder):
    unet = diffusers_io.load_unet(folder)
    ours, theirs = diffusers_io.state_dict(unet), pipeline.unet.state_dict()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy())
    config, g = pipeline.unet.config, torch.Generator().manual_seed(0)
    sample = torch.randn(2, config.in_channels, 8, 8, generator=g)
    context = torch.randn(2, 8, config.cross_attention_dim, generator=g)
    added = None
    pooled = ids = None
    if config.addition_embed_type:
        pooled, ids = torch.randn(2, 24, generator=g), torch.full((2, 6), 32.0)
        added = {"text_embeds": pooled, "time_ids": ids}
    times = torch.tensor([7, 901])
    with torch.no_grad():
        wanted = pipeline.unet(sample, times, context, added_cond_kwargs=added).sample
    arrays = (sample.permute(0, 2, 3, 1), times, context, pooled, ids)
    structure, params = parameters.split(unet)
    call = jax.jit(lambda p, *x: parameters.merge(structure, p)(*x))
    found = call(params, *[None if x is None else jnp.asarray(x.numpy()) for x in arrays])
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1), atol=2e-4, rtol=2e-4)


# --- the image's channels -------------------------------------------------------


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """(PyTorch's VAE, ours) of one folder."""
    theirs = torch_pipelines.make_vae()
    folder = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(folder)
    return theirs, diffusers_io.load_vae(folder)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["edit", "inpaint"])
@pytest.mark.parametrize("xl", [False, True])
def test_image_channels_are_those_of_pytorch(kind, xl, vaes, monkeypatch):
    """Higher than wide, and a mask whose edges lie across the latents' pixels."""
    height, width, factor = 40, 24, 4
    theirs, ours = vaes
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, height, width, 3)).astype(np.float32)
    masks = (rng.random((3, height, width, 1)) < 0.5).astype(np.float32)
    x, m = (torch.tensor(a).permute(0, 3, 1, 2) for a in (images, masks))
    take_the_mean(monkeypatch)
    names = torch_pipelines.PIPELINES[f"{'sdxl' if xl else 'sd'}_{kind}"]
    pipeline = getattr(diffusers, names[0])
    self = types.SimpleNamespace(vae=theirs, vae_scale_factor=factor, is_cosxl_edit=False)
    given = {"device": "cpu", "dtype": torch.float32, "do_classifier_free_guidance": False}
    with torch.no_grad():
        if kind == "edit":
            wanted = pipeline.prepare_image_latents(self, x, 3, 1, **given)
        else:
            self._encode_vae_image = types.MethodType(pipeline._encode_vae_image, self)
            masked = x * (m < 0.5)
            wanted = torch.cat(
                pipeline.prepare_mask_latents(
                    self, m, masked, 3, height, width, generator=None, **given
                ),
                dim=1,
            )
    scaling = ours.config.scaling_factor
    arrays = jnp.asarray(images), jnp.asarray(masks)
    given = {"edit": editing.EDIT, "inpaint": editing.INPAINT}[kind]
    found = given.channels(ours.encode, *arrays, scaling_factor=scaling)
    assert found.shape[-1] == given.width(4)
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1), atol=2e-5)


FAMILY = {family.name: family for family in families.FAMILIES.values()}


@pytest.mark.parametrize(
    ("name", "channels", "match"),
    [
        ("sd", 8, "takes 8 channels, but sd models take 4 of the latents and 0 of a given"),
        ("sd_edit", 4, r"takes 4 channels, but sd_edit .* 4 of a given image, 8 in all"),
        ("sdxl_inpaint", 8, r"takes 8 channels, but sdxl_inpaint .* 5 of a given image, 9 in all"),
        ("sd_inpaint", 4, r"takes 4 channels, the latents alone, .* text-to-image class"),
    ],
)
def test_channels_that_do_not_fit_are_refused(name, channels, match):
    with pytest.raises(ValueError, match=match):
        FAMILY[name].check_channels(channels, 4)
    fitting = {"sd": 4, "sd_edit": 8, "sdxl_inpaint": 9, "sd_inpaint": 9}[name]
    FAMILY[name].check_channels(fitting, 4)


@pytest.mark.parametrize("key", ["is_cosxl_edit", "requires_aesthetics_score"])
def test_other_conditioning_is_refused_by_name(key, tmp_path):
    index = {"_class_name": "StableDiffusionXLInpaintPipeline", key: False}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert diffusers_io.load_family(tmp_path)[1].name == "sdxl_inpaint"
    (tmp_path / "model_index.json").write_text(json.dumps({**index, key: True}))
    with pytest.raises(ValueError, match=f"{key}=True; supported: false"):
        diffusers_io.load_family(tmp_path)


# --- pairs with an image --------------------------------------------------------


def raw(shape=(60, 48), mask_shape=None, **changes):
    """A pair of 40 x 40 images; in source and mask the same band is white."""
    row = rows(1, 40)[0]
    band = np.zeros((*shape, 3), np.uint8)
    band[: shape[0] // 2, shape[1] // 4 :] = 255
    mask = Image.fromarray(band).resize((mask_shape or shape)[::-1], Image.Resampling.NEAREST)
    given = {"source": png(band), "mask": png(np.asarray(mask)), **changes}
    return sources.RawPair("x:0", "a", (row["jpg_0"], row["jpg_1"]), 1.0, **given)


@pytest.mark.parametrize("mask_shape", [None, (30, 24)])
def test_source_and_mask_are_cropped_alike(mask_shape):
    pixels = load_pixels(raw(mask_shape=mask_shape), ("source", "mask"), 32)
    assert pixels.images.shape == (2, 32, 32, 3)
    assert pixels.source.shape == (32, 32, 3)
    assert pixels.mask.shape == (32, 32, 1)
    assert set(np.unique(pixels.mask)) == {0, 1}
    assert pixels.mask[:, 8:].any(1).sum() == 16  # 60 rows become 40, of which 4 are cut off
    assert pixels.mask[:, :7].sum() == 0
    differ = (pixels.source.mean(-1, keepdims=True) > 127) != pixels.mask
    assert differ.mean() < 0.05  # but for where resizing blurs the source's edge
    np.testing.assert_array_equal(pixels.sizes, [[40, 40, 0, 0, 32, 32]] * 2)
    assert load_pixels(raw(), ("source",), 32).mask is None
    assert load_pixels(raw(), (), 32).source is None


def test_masks_are_resized_to_the_nearest_pixel():
    noise = np.uint8(255 * (np.random.default_rng(0).random((64, 64)) < 0.5))
    pixels = load_pixels(raw((64, 64), mask=png(noise)), ("source", "mask"), 32)
    np.testing.assert_array_equal(pixels.mask[..., 0], noise[1::2, 1::2] // 255)


def test_a_mask_of_another_ratio_or_a_broken_image_makes_a_bad_pair():
    skipped = load_pixels(raw(mask_shape=(48, 48)), ("source", "mask"), 32)
    assert skipped.reason == "mask's shape"
    assert re.search(r"source's shape, \(60, 48\), .* but got \(48, 48\)", skipped.detail)
    for field in ("source", "mask"):
        skipped = load_pixels(raw(**{field: b"bad"}), ("source", "mask"), 32)
        assert f"{field}: cannot decode an image of 3 bytes" in skipped.detail


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    return torch_pipelines.write("sd_inpaint", tmp_path_factory.mktemp("made") / "model")


@pytest.mark.parametrize("column", ["jpg_source", "mask"])
def test_a_missing_column_is_named_before_encoding(inpainting, column, tmp_path):
    sources.write_pick_a_pic(tmp_path / "all.parquet", rows(3))
    table = pq.read_table(tmp_path / "all.parquet").drop_columns([column])
    pq.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=rf"sd_inpaint .* column '{column}' .*pairs.parquet"):
        tiny.encode(f"pickapic:{tmp_path}/pairs.parquet", inpainting, tmp_path / "out")


def test_a_pair_without_its_source_is_left_out(inpainting, tmp_path):
    made = rows(3)
    del made[2]["jpg_source"]
    sources.write_pick_a_pic(tmp_path / "pairs.parquet", made)
    tiny.encode(f"pickapic:{tmp_path}/pairs.parquet", inpainting, tmp_path / "out")
    assert records.open_pairs(tmp_path / "out").meta.skipped == {"no source": 1}


def test_pairs_of_another_kind_are_refused():
    family = FAMILY["sd_inpaint"]
    facts = family.facts(debug.model_config(family))
    meta = EncodedMeta.expected(
        family, facts, size=(8, 8), latent_channels=4, tokens=8, scaling_factor=1.0
    )
    check_fits(family, facts, meta)
    with pytest.raises(ValueError, match="images of kind 'inpaint', the encoded pairs hold ''"):
        check_fits(family, facts, dataclasses.replace(meta, image_kind=""))
    with pytest.raises(ValueError, match="packed 1 x 1, the encoded pairs are packed 2 x 2"):
        check_fits(family, facts, dataclasses.replace(meta, pack=2))


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILY)
def test_debug_pipelines_open_in_pytorch(name, tmp_path):
    family = FAMILY[name]
    debug.write_tiny_pipeline(epath.Path(tmp_path), family)
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(tmp_path)
    assert type(pipeline).__name__ == family.pipeline
    model = getattr(pipeline, family.component)
    FAMILY[name].check_channels(model.config.in_channels, pipeline.vae.config.latent_channels)

"""`model.start` and `model.reference`: what a run begins with, and is measured against."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from dmpo_jax import diffusers_io
from dmpo_jax.jobs import train
from dmpo_jax.jobs.convert import convert
from dmpo_jax.jobs.run import run
from dmpo_jax.models import lora, parameters
from dmpo_jax.training import step
from tests.support import outside_family, tiny
from tests.support.outside_family import OutsideTransformer2DModel

TARGETS = ("proj_out", "x_embedder")
SHORT = {"train__steps": 2, "log__validate_every": 0, "objectives__dmpo__beta": 100.0}
LORA = {"lora__rank": 2, "lora__alpha": 8.0, "lora__targets": TARGETS}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with outside_family.registered():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, _registered):
    """Folder with `model`, `encoded`, `sft` (a pipeline) and `lora` (rank 2, a file)."""
    folder = tmp_path_factory.mktemp("starts")
    model, _ = tiny.write(folder, outside_family.write)
    save_moved(model, folder / "sft")
    save_adapters(model, folder / "lora")
    return folder


def save_moved(model, out, seed=0):
    """A pipeline whose trained parameters lie elsewhere, as after training them."""
    loaded = diffusers_io.load_model(model)
    structure, params = parameters.split(loaded)
    rng = np.random.default_rng(seed)
    kept = parameters.buffer_paths(loaded)
    params = {
        path: x if path in kept else x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)
        for path, x in params.items()
    }
    diffusers_io.save_pipeline(parameters.merge(structure, params), model, epath.Path(out))


def save_adapters(model, out, seed=0, rank=2, targets=TARGETS, component="transformer"):
    """A LoRA file whose adapters all do something."""
    attached = lora.Adapters(rank=rank, targets=targets).attach(diffusers_io.load_model(model))
    rng = np.random.default_rng(seed)
    adapters = {
        path: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32)
        for path, x in lora.partition(parameters.split(attached)[1])[1].items()
    }
    diffusers_io.save_lora(adapters, epath.Path(out), scale=1.0, component=component)


def configure(made, **leaves):
    return tiny.make_config(str(made / "model"), str(made / "encoded"), **{**SHORT, **leaves})


def prepare(made, **leaves):
    return train.prepare(configure(made, **leaves), epath.Path(made / "nowhere"))


def arrays(folder):
    return as_numpy(parameters.split(diffusers_io.load_model(folder))[1])


def as_numpy(params):
    return {path: np.asarray(x, np.float32) for path, x in params.items()}


def merged(model, file):
    """The model's parameters with the file's adapters folded in, by NumPy."""
    params = dict(arrays(model))
    adapters = diffusers_io.load_lora(file, component="transformer")
    for path, down in adapters.items():
        if ".lora_A." in path:
            layer = path.removesuffix(".lora_A.kernel")
            params[f"{layer}.kernel"] = (
                params[f"{layer}.kernel"] + down @ adapters[f"{layer}.lora_B.kernel"]
            )
    return params


def assert_close(got, want, bound=0.0):
    for path, x in got.items():
        np.testing.assert_allclose(x, want[path], rtol=bound, atol=bound, err_msg=path)


def margins(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [row["margin_abs_max"] for row in rows if "loss" in row]
    assert len(found) >= 2
    assert found[-1] > 0
    return found


BOTH = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


# --- every parameter ------------------------------------------------------------


@pytest.mark.long
@BOTH
def test_a_full_run_begins_at_the_start_and_is_measured_against_it(
    dtype, made, tmp_path, exact_steps
):
    start = str(made / "sft" / "transformer")  # the component alone
    leaves = {"model__start": start, "model__compute_dtype": dtype}
    ran, params = prepare(made, **leaves)
    assert_close(as_numpy(params), arrays(made / "sft"))
    bound = 2**-8 if dtype == "bfloat16" else 0.0
    assert_close(as_numpy(ran.step.reference), arrays(made / "sft"), bound)
    run(configure(made, **leaves), tmp_path)
    assert margins(tmp_path)[0] == 0
    out, sft, base = (arrays(x) for x in (tmp_path / "export", made / "sft", made / "model"))
    for path in params:
        assert np.abs(out[path] - sft[path]).max() < np.abs(out[path] - base[path]).max()
    # The rest of the pipeline is the folder's.
    want = diffusers_io.digest_encoders(str(made / "model"))
    assert diffusers_io.digest_encoders(tmp_path / "export") == want


@pytest.mark.long
def test_a_reference_of_its_own_gives_margins_from_the_first_step(made, tmp_path, exact_steps):
    leaves = {"model__start": str(made / "sft"), "model__reference": str(made / "model")}
    ran, params = prepare(made, **leaves)
    assert_close(as_numpy(params), arrays(made / "sft"))
    assert_close(as_numpy(ran.step.reference), arrays(made / "model"))
    run(configure(made, **leaves), tmp_path / "apart")
    assert margins(tmp_path / "apart")[0] > 0
    # The same weights under another name are the same reference, in bfloat16 too.
    shutil.copytree(made / "sft", tmp_path / "copy")
    leaves = {"model__start": str(made / "sft"), "model__reference": str(tmp_path / "copy")}
    run(configure(made, **leaves, model__compute_dtype="bfloat16"), tmp_path / "equal")
    assert margins(tmp_path / "equal")[0] == 0


@pytest.mark.long
@BOTH
def test_a_reference_that_is_loaded_equals_one_that_is_copied(
    dtype, made, tmp_path, exact_steps, monkeypatch
):
    monkeypatch.setattr(diffusers_io.Start, "digest", lambda start: start.option)
    leaves = {"model__start": str(made / "sft"), "model__reference": str(made / "sft")}
    run(configure(made, **leaves, model__compute_dtype=dtype), tmp_path)
    assert margins(tmp_path)[0] == 0


@pytest.mark.long
def test_a_lora_file_is_merged_into_a_full_run(made, tmp_path, exact_steps):
    leaves = {"model__start": str(made / "lora"), "mesh__data": 1, "mesh__fsdp": 8}
    ran, params = prepare(made, **leaves)
    want = merged(made / "model", made / "lora")
    assert np.abs(want["proj_out.kernel"] - arrays(made / "model")["proj_out.kernel"]).max() > 0.1
    assert_close(as_numpy(params), want, 1e-6)
    run(configure(made, **leaves), tmp_path)
    assert margins(tmp_path)[0] == 0
    file = made / "lora" / diffusers_io.LORA_FILE  # as the reference of a run from the folder's own
    ran, params = prepare(made, model__reference=str(file), model__compute_dtype="bfloat16")
    assert_close(as_numpy(params), arrays(made / "model"))
    assert_close(as_numpy(ran.step.reference), want, 2**-8)


# --- adapters -------------------------------------------------------------------


@pytest.mark.long
@BOTH
def test_adapters_go_on_from_a_lora_file_and_are_measured_against_it(
    dtype, made, tmp_path, exact_steps
):
    leaves = {**LORA, "model__start": str(made / "lora"), "model__compute_dtype": dtype}
    ran, params = prepare(made, **leaves)
    file = diffusers_io.load_lora(made / "lora", component="transformer")
    assert params.keys() == file.keys()
    for path, x in file.items():
        scale = 4 if ".lora_B." in path else 1  # alpha / rank
        np.testing.assert_array_equal(scale * np.asarray(params[path]), x)
        np.testing.assert_array_equal(ran.step.reference[path], params[path])
    run(configure(made, **leaves), tmp_path / "run")
    assert margins(tmp_path / "run")[0] == 0
    if dtype == "bfloat16":
        return
    tuned = diffusers_io.load_lora(tmp_path / "run" / "lora", component="transformer")
    moved = [np.abs(tuned[path] - x).max() for path, x in file.items()]
    assert min(moved) > 0
    assert max(moved) < 0.01
    assert_close(
        arrays(tmp_path / "run" / "export"), merged(made / "model", tmp_path / "run" / "lora"), 1e-6
    )
    for steps in (1, 2):  # resumed: the reference is still the file, not the checkpoint
        run(configure(made, **{**leaves, "train__steps": steps}), tmp_path / "parts")
    again = diffusers_io.load_lora(tmp_path / "parts" / "lora", component="transformer")
    for path, x in tuned.items():
        np.testing.assert_array_equal(again[path], x)


def test_reference_adapters_are_frozen(made):
    ran, params = prepare(made, **LORA, model__start=str(made / "lora"))
    before = jax.tree.map(np.array, ran.step.reference)
    state = ran.step.make_state(params)
    update = ran.step.make_update(state)
    from dmpo_jax.parallel import meshes

    batch = meshes.shard_batch(next(ran.batches()), ran.step.batch_sharding(), 8)
    state, metrics = update(state, ran.step.reference, batch, ran.key)
    state, metrics = update(state, ran.step.reference, batch, ran.key)
    assert float(metrics["margin_abs_max"]) > 0
    for path, x in before.items():
        np.testing.assert_array_equal(np.asarray(ran.step.reference[path]), x)
        if lora.is_adapter(path):
            assert np.abs(np.asarray(state.params[path]) - x).max() > 0


@pytest.mark.long
def test_adapters_on_another_folder_are_exported_with_it(made, tmp_path, exact_steps):
    run(configure(made, **LORA, model__start=str(made / "sft")), tmp_path)
    assert margins(tmp_path)[0] == 0
    want = merged(made / "sft", tmp_path / "lora")
    assert_close(arrays(tmp_path / "export"), want, 1e-6)
    convert(workdir=tmp_path, out=tmp_path / "again", merge=True)
    assert_close(arrays(tmp_path / "again"), want, 1e-6)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert (
        "transformer=diffusers.OutsideTransformer2DModel.from_pretrained('sft', subfolder" in card
    )
    assert "started from `sft`" in card


@pytest.mark.long
def test_adapters_measured_against_the_base_or_other_adapters(made, tmp_path, exact_steps):
    start = {**LORA, "model__start": str(made / "lora")}
    ran, params = prepare(made, **start, model__reference=str(made / "model"))
    assert not any(map(lora.is_adapter, ran.step.reference))
    assert np.abs(params["proj_out.lora_B.kernel"]).max() > 0
    save_adapters(made / "model", tmp_path / "other", seed=1)
    leaves = {**start, "model__reference": str(tmp_path / "other")}
    ran, params = prepare(made, **leaves)
    want = diffusers_io.load_lora(tmp_path / "other", component="transformer")
    got = 4 * np.asarray(ran.step.reference["proj_out.lora_B.kernel"])
    np.testing.assert_array_equal(got, want["proj_out.lora_B.kernel"])
    for name, reference in (("base", made / "model"), ("other", tmp_path / "other")):
        run(configure(made, **start, model__reference=str(reference)), tmp_path / name)
        assert margins(tmp_path / name)[0] > 0


def test_an_objective_without_reference_holds_none(made):
    ran, params = prepare(made, **LORA, model__start=str(made / "lora"), objective="sft")
    assert not any(map(lora.is_adapter, ran.step.reference))
    assert np.abs(params["proj_out.lora_B.kernel"]).max() > 0


# --- identity -------------------------------------------------------------------


@pytest.mark.long
def test_a_run_knows_its_start_and_reference_by_content(made, tmp_path):
    sft = shutil.copytree(made / "sft", tmp_path / "sft")
    leaves = {"model__start": str(sft), "model__reference": str(made / "model")}
    run(configure(made, **leaves), tmp_path / "run")
    shutil.move(sft, tmp_path / "moved")
    leaves["model__start"] = str(tmp_path / "moved")
    run(configure(made, **leaves, train__steps=3), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    convert(workdir=tmp_path / "run", out=tmp_path / "out")
    for change, word in (
        ({"model__start": ""}, "start"),
        ({"model__start": str(made / "lora")}, "start"),
        ({"model__reference": ""}, "reference"),
    ):
        with pytest.raises(ValueError, match=rf"content\.{word} weights: '\w+' there, '\w+' now"):
            run(configure(made, **{**leaves, **change}), tmp_path / "run")
    save_moved(made / "model", tmp_path / "moved", seed=3)
    with pytest.raises(ValueError, match=r"content\.start weights: '\w+' there, '\w+' now"):
        run(configure(made, **leaves), tmp_path / "run")


@pytest.mark.long
def test_a_run_without_start_refuses_one_later(made, tmp_path):
    run(configure(made), tmp_path)
    with pytest.raises(ValueError, match=r"content\.start weights: '\w+' there, '\w+' now"):
        run(configure(made, model__start=str(made / "sft")), tmp_path)
    run(configure(made, model__start=str(made / "model"), train__steps=3), tmp_path)  # its own


def test_a_dry_run_says_what_a_run_begins_with(made, tmp_path, capsys):
    start, reference = str(made / "sft"), str(made / "model")
    config = configure(made, model__start=start, model__reference=reference)
    run(config, tmp_path / "run", dry_run=True)
    said = capsys.readouterr().out
    assert f"train: model.folder = '{reference}', model.start = '{start}'" in said
    assert f"begins with {start}, measured against {reference}" in said
    assert "refusals: none" in said
    with pytest.raises(SystemExit):
        run(configure(made, model__start=str(made / "no")), tmp_path / "run", dry_run=True)
    assert "no' does not exist" in capsys.readouterr().out


# --- refusals -------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(made):
    outside_family.write(made / "wide", hidden=32)
    save_adapters(made / "wide", made / "wide_lora")
    save_adapters(made / "model", made / "rank4", rank=4)
    save_adapters(made / "model", made / "blocks", targets=("blocks.0", "proj_out"))
    save_adapters(made / "model", made / "unet", component="unet")
    (made / "empty").mkdir()
    (made / "dora").mkdir()
    tensors = load_file(made / "lora" / diffusers_io.LORA_FILE)
    ups = {name: x for name, x in tensors.items() if name.endswith(".lora_B.weight")}
    for name, x in ups.items():
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = np.ones(len(x), "f4")
    save_file(tensors, made / "dora" / diffusers_io.LORA_FILE)
    return made


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        ({"start": "nowhere"}, r"model folder '.*nowhere' does not exist"),
        ({"start": "no.safetensors"}, r"model\.start=.*no\.safetensors .* but does not exist"),
        (
            {"reference": "pairs.parquet"},
            r"model\.reference=.* a LoRA file \(\.safetensors\), but is another",
        ),
        ({"start": "empty"}, r"model\.start=.*empty should be .* nor pytorch_lora_weights"),
        ({"start": "wide"}, r"another architecture than .*: hidden=32 \(the pipeline's: 24\)"),
        ({"start": "sft/vae"}, r"a OutsideAutoencoderKL, but .* a OutsideTransformer2DModel"),
        ({"reference": "wide/transformer"}, r"model\.reference=.* hidden=32"),
        ({"start": "wide_lora"}, r"adapts the layer \w+, \(\d+, \d+\), but .* has \(\d+, \d+\)"),
        ({"start": "unet"}, "only adapters of its transformer are read"),
        (
            {**LORA, "start": "rank4"},
            r"adapters of rank 4, but lora\.rank=2 is trained: set --config\.lora\.rank=4",
        ),
        (
            {**LORA, "start": "blocks"},
            r"adapts blocks\.0, which lora\.targets does not name and does not adapt x_embedder, "
            r"which lora\.targets names: set --config\.lora\.targets=",
        ),
        (
            {**LORA, "start": "dora"},
            r"model\.start=.*dora is a DoRA file; .* are plain LoRA: merge",
        ),
        ({**LORA, "reference": "rank4"}, r"model\.reference=.* rank 4"),
        ({**LORA, "reference": "sft"}, "another complete model .* train every parameter"),
        (
            {**LORA, "start": "sft", "reference": "lora"},
            r"is a LoRA file on .*, but the adapters are trained on --config\.model\.start=",
        ),
        ({"reference": "sft", "objective": "sft"}, r"model\.reference .* 'sft' does not do"),
    ],
)
def test_what_does_not_fit_is_refused_before_compiling(leaves, words, wrong, tmp_path, monkeypatch):
    def compiled(*args, **kw):
        raise AssertionError("compiled")

    monkeypatch.setattr(step, "jit_train_step", compiled)
    given = {
        f"model__{name}" if name in ("start", "reference") else name: str(wrong / value)
        if name in ("start", "reference")
        else value
        for name, value in leaves.items()
    }
    with pytest.raises(ValueError, match=words):
        run(configure(wrong, **given), tmp_path / "run")


def test_a_reference_with_other_buffers_is_refused(made, tmp_path):
    model = diffusers_io.load_model(made / "model")
    model.positions[...] = model.positions[...] + 1
    diffusers_io.save_pipeline(model, made / "model", tmp_path / "other")
    assert isinstance(model, OutsideTransformer2DModel)
    with pytest.raises(ValueError, match="other numbers in positions, which are not trained"):
        prepare(made, model__reference=str(tmp_path / "other"))

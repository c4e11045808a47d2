"""Parts that an export takes from the model folder, and files that it leaves alone in its own."""

import json
import os

import pytest

from dmpo_jax import diffusers_io
from dmpo_jax.models.unet import UNet2DConditionModel
from tests.support import tiny
from tests.support.model_folders import UNET, filled

PARTS = ("unet", "vae", "scheduler", "safety_checker")
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "requires_safety_checker": True,
    "feature_extractor": [None, None],
    **{name: ["diffusers", "x"] for name in PARTS},
}


@pytest.fixture
def source(tmp_path):
    """A pipeline folder of small files, with a key beside it and more than its parts inside."""
    folder = tmp_path / "source"
    for name in (*PARTS, ".git", "docs"):
        (folder / name / "deeper").mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        (folder / name / "deeper" / "file").touch()
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config.json").write_text("a key")
    return folder


def save(source, out):
    diffusers_io.save_pipeline(filled(UNet2DConditionModel, UNET, 3.0), source, out)


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


COPIED = {
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    *(f"{name}/config.json" for name in PARTS[1:]),
}


def test_the_parts_that_the_index_names_are_copied_and_no_more(source, tmp_path):
    save(source, tmp_path / "out")
    assert files(tmp_path / "out") == COPIED


def test_what_is_not_the_exports_stays(source, tmp_path):
    out = tmp_path / "out"
    kept = {".git/HEAD", "docs/page.md", "vae/notes.md", "vae/old/model.safetensors"}
    stale = {"vae/model.safetensors", "vae/model.fp16.safetensors", "vae/pytorch_model.bin"}
    for name in kept | stale:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    save(source, out)
    assert files(out) == COPIED | kept


@pytest.mark.parametrize("part", ["safety_checker", "vae/config.json", "scheduler"])
def test_a_link_out_of_the_folder_is_refused_before_anything_is_written(part, source, tmp_path):
    link = source / part
    target = {"safety_checker": "../.ssh", "scheduler": "."}.get(part, "../../.ssh/config.json")
    if link.is_dir():
        link.rename(tmp_path / "moved")
    else:
        link.unlink()
    link.symlink_to(target)
    with pytest.raises(ValueError, match=rf"{part} is a link to .*put a copy in its place"):
        save(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_its_files(source, tmp_path):
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    snapshot = source.rename(repository / "snapshots" / "0123")
    (snapshot / "vae" / "config.json").rename(repository / "blobs" / "abc")
    (snapshot / "vae" / "config.json").symlink_to("../../../blobs/abc")
    save(snapshot, tmp_path / "out")
    assert not (tmp_path / "out" / "vae" / "config.json").is_symlink()
    (repository / "refs").touch()
    (snapshot / "vae" / "refs").symlink_to("../../../refs")
    with pytest.raises(ValueError, match="refs is a link"):
        save(snapshot, tmp_path / "other")


def test_a_part_that_is_a_path_is_refused(source, tmp_path):
    for name in ("../.ssh", "/etc", "vae/deeper"):
        index = {**INDEX, name: ["diffusers", "x"]}
        (source / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="names a part"):
            save(source, tmp_path / "out")


def test_an_export_into_its_own_source_is_refused_before_training(source, tmp_path):
    os.symlink(source, tmp_path / "link")
    for out in (source / "export", source / "a" / "b", tmp_path / "link" / "export"):
        with pytest.raises(ValueError, match="lies inside the model folder"):
            save(source, out)
    with pytest.raises(ValueError, match="is the model that is trained"):
        diffusers_io.check_export(source, tmp_path / "link")
    from dmpo_jax.jobs.run import run

    with pytest.raises(ValueError, match="lies inside the model folder"):
        run(tiny.make_config(str(source), "nowhere"), source)
    assert not (source / "export").exists()

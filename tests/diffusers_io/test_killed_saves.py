"""A save that dies at any of its writes leaves no folder that passes for whole."""

import functools
import json
import shutil

import pytest
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.models.vae import AutoencoderKL
from tests.support.model_folders import UNET, VAE, filled, shape_of, tiny_text, values

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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

    opens = kind.open

    def open_dying(self, mode="r", **kw):
        """A stream of which the first writes count: header, a tensor, another."""
        stream = opens(self, mode, **kw)
        if "w" not in mode:
            return stream
        write, writes = stream.write, iter(range(3))

        class Dying:
            def __enter__(self):
                return self

            def __exit__(self, *exception):
                stream.close()

            def write(self, data):
                count[0] += next(writes, None) is not None
                if count[0] > k:
                    if count[0] == k + 1:
                        write(data[: len(data) // 2])
                    raise Killed
                return write(data)

        return Dying()

    monkeypatch.setattr(kind, "open", open_dying)


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


@pytest.mark.long
@pytest.mark.parametrize("after", [WHOLE, SHARDS])
@pytest.mark.parametrize("before", [WHOLE, SHARDS])
def test_a_killed_save_never_mixes_weights(before, after, tmp_path, monkeypatch):
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


PARTS = {name: ["diffusers", "x"] for name in ("unet", "vae", "scheduler")}


def make_pipeline(folder, value, index):
    """A pipeline folder whose every number is `value`."""
    diffusers_io.save_unet(filled(UNet2DConditionModel, UNET, value), folder / "unet")
    vae = filled(AutoencoderKL, VAE, value)
    diffusers_io.save_vae(vae, folder / "vae", shard_bytes=10_000 if value == 2.0 else 2**30)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.long
def test_a_killed_pipeline_save_never_passes_for_whole(tmp_path, monkeypatch):
    index = {"_class_name": "StableDiffusionPipeline", **PARTS}
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
    index = {"_class_name": "StableDiffusionPipeline", **PARTS}
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

"""Hub ids: the revision that is fetched, the commit that a run keeps, and what is no hub id."""

import json
import os
import shutil

import pytest

from dmpo_jax import diffusers_io
from dmpo_jax.config.step_settings import with_commits
from dmpo_jax.diffusers_io import folders
from tests.support import tiny

OLD, NEW = "0123456789abcdef" * 2 + "01234567", "f" * 40


class Hub:
    """A stand-in for the hub: the commit of each revision, in a cache of the client's layout."""

    def __init__(self, cache, monkeypatch):
        self.cache, self.asked = cache, []
        self.commits = {None: OLD, "main": OLD, "v1": OLD}
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)
        self.restart()

    def restart(self) -> None:
        """Forgets what a process remembers."""
        folders._fetch.cache_clear()

    def download(self, repository, *, revision=None, allow_patterns=()):
        self.asked.append((repository, revision))
        commit = self.commits.get(revision, revision)
        folder = self.cache / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    yield Hub(tmp_path / "cache", monkeypatch)
    folders._fetch.cache_clear()


def test_a_revision_is_fetched_and_its_commit_returned(hub):
    folder, commit = diffusers_io.resolve("org/name@v1")
    assert hub.asked == [("org/name", "v1")]
    assert (folder.name, commit) == (OLD, OLD)
    assert diffusers_io.resolve(f"org/name@{NEW}").commit == NEW
    assert diffusers_io.pinned("org/name@v1") == f"org/name@{OLD}"
    assert diffusers_io.hub_id(f"org/name@{OLD}") == "org/name"


def test_a_process_keeps_to_the_commit_that_it_found_first(hub):
    first = diffusers_io.resolve("org/name")
    hub.commits[None] = NEW
    assert diffusers_io.resolve("org/name") == first


def test_a_folder_is_a_folder_whatever_its_name(hub):
    for name in ("org/name", "org/name@v1"):
        os.makedirs(name)
        assert diffusers_io.resolve(name) == (folders.epath.Path(name), "")
        assert diffusers_io.pinned(name) == diffusers_io.hub_id(name) == name
        shutil.rmtree(name)
    assert diffusers_io.pinned("") == ""
    assert not hub.asked


def test_a_path_typed_wrong_is_not_fetched(hub):
    os.makedirs("runs/other")
    open("runs/file", "w").close()
    with pytest.raises(ValueError, match=r"runs/export' does not exist, though 'runs' does.*@main"):
        diffusers_io.load_unet("runs/export")
    with pytest.raises(ValueError, match="'runs/file' is a file"):
        diffusers_io.load_unet("runs/file")
    for name in ("./runs", "../org/name", "org/name@", "org/name@../x", "org/na me", "a/b/c"):
        with pytest.raises(ValueError, match=r"does not exist|is missing"):
            diffusers_io.load_family(name + "/" if name == "./runs" else name)
    assert not hub.asked
    diffusers_io.resolve("runs/export@main")
    assert hub.asked == [("runs/export", "main")]


def test_a_run_keeps_the_commits_that_it_began_with(hub, tmp_path):
    config = tiny.make_config("org/name", "pairs", model__vae="org/vae@v1")
    began = with_commits(config, folders.epath.Path(tmp_path))
    assert (began.model.folder, began.model.vae) == (f"org/name@{OLD}", f"org/vae@{OLD}")
    recorded = {"model.folder": began.model.folder, "model.vae": began.model.vae}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    hub.restart()
    hub.commits |= {None: NEW, "v2": NEW}
    resumed = with_commits(config, folders.epath.Path(tmp_path))
    assert resumed.model.folder == f"org/name@{OLD}"
    config.model.folder = "org/name@v2"  # asked for: it is another run
    assert with_commits(config, folders.epath.Path(tmp_path)).model.folder == f"org/name@{NEW}"

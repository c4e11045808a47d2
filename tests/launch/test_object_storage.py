"""A run whose workdir is on gs://, against a local fake of the service.

pip install gcsfs gcp-storage-emulator && pytest -m slow tests/launch/test_object_storage.py
"""

import gc
import json
import threading

import numpy as np
import pytest
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.jobs.convert import convert
from dmpo_jax.jobs.run import run
from dmpo_jax.training import checkpoint
from dmpo_jax.training import metrics as writers
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # the fake's and its client's own


@pytest.mark.parametrize("url", ["s3://bucket/run", "az://bucket/run"])
def test_a_workdir_where_no_checkpoint_can_be_written_is_refused(url):
    config = tiny.make_config("nowhere", "nowhere")
    with pytest.raises(ValueError, match=f"local folders and gs://, but got {url}"):
        run(config, url)
    with pytest.raises(ValueError, match="mount the bucket"):
        checkpoint.Checkpoints(f"{url}/checkpoints", keep=1, identity={})


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket, in memory behind a local port; what Orbax, epath and fsspec all speak to."""
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    fake = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    fake.start()
    url = f"http://127.0.0.1:{fake._api._httpd.server_address[1]}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    yield epath.Path("gs://bucket")
    gc.collect()
    threading.Thread(target=fake.stop, daemon=True).start()


@pytest.mark.slow
def test_a_run_on_gs_is_that_on_a_disk(bucket, tmp_path, monkeypatch):
    made = tiny.write(tmp_path / "made")
    leaves = {"log__tensorboard": False}
    run(tiny.make_config(*made, **leaves), tmp_path / "run")
    monkeypatch.setattr(writers.MetricsWriter, "PART_SECONDS", 0.0)
    workdir = bucket / "run"
    run(tiny.make_config(*made, **leaves, train__steps=3), workdir)
    assert checkpoint_steps(workdir) == [2, 3]
    run(tiny.make_config(*made, **leaves), workdir)  # goes on
    want = diffusers_io.state_dict(diffusers_io.load_unet(tmp_path / "run" / "export"))
    exported = diffusers_io.state_dict(diffusers_io.load_unet(workdir / "export"))
    convert(workdir=workdir, out=workdir / "converted")
    converted = diffusers_io.state_dict(diffusers_io.load_unet(workdir / "converted"))
    for name in want:
        np.testing.assert_array_equal(exported[name], want[name], err_msg=name)
        np.testing.assert_array_equal(converted[name], want[name], err_msg=name)
    rows = []
    for part in sorted(workdir.glob("metrics-*.jsonl")):
        rows += [json.loads(line) for line in part.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "gs:").exists()


def checkpoint_steps(workdir) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())

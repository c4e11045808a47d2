"""Tests for notebooks/: stripped of outputs, linked; with `-m slow` executed at small scale."""

import ast
import json
import os
import pathlib
import re

import pytest

from dmpo_jax.config import checks

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 1800  # of a cell, on a busy machine
# What the last cells write, of each small run, in runs/.
WRITTEN = {
    "digits": ["digits_notebook_small/evaluation/report/index.html"],
    "own_pairs": ["own_pairs_small/run/lora/pytorch_lora_weights.safetensors"],
    "kaggle_tpu": ["kaggle_sd15_small/drawn/grid.png"],
}
# Code cells that compile next to nothing.
FIRST = {"digits": 1, "own_pairs": 3, "kaggle_tpu": 3}


def cells(path: pathlib.Path, kind: str) -> list[str]:
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def name_of(path: pathlib.Path) -> str:
    return path.stem


def test_they_are_known_here_and_linked():
    assert {path.stem for path in NOTEBOOKS} == set(WRITTEN)
    page = (ROOT / "docs" / "notebooks.md").read_text()
    for path in NOTEBOOKS:
        assert f"(../notebooks/{path.name})" in page
    assert "(docs/notebooks.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_they_hold_no_outputs(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert set(cell) <= {"cell_type", "id", "metadata", "source", "outputs", "execution_count"}
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert not cell["metadata"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_code_is_python_and_links_lead_to_files(path):
    for source in cells(path, "code"):
        ast.parse(source)
    for text in cells(path, "markdown"):
        for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            ast.parse(block)
        for link in re.findall(r"\]\((?!\w+:)([^)#]+)", text):
            assert (path.parent / link).exists(), link


def changed(source: str, **values: str) -> str:
    """Returns a cell with SMALL = True, and other names set alike."""
    for name, value in {"SMALL": "True", **values}.items():
        source = re.sub(rf"^{name} = [^ #\n]+", f"{name} = {value}", source, flags=re.MULTILINE)
    return source


@pytest.mark.parametrize(("name", "count"), FIRST.items())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_first_cells_run(name, count, tmp_path, monkeypatch):
    """Without a kernel: all that needs no model."""
    pytest.importorskip("IPython")
    monkeypatch.chdir(tmp_path)
    given: dict = {}
    for source in cells(ROOT / "notebooks" / f"{name}.ipynb", "code")[:count]:
        exec(compile(changed(source), name, "exec"), given)
    assert given["SMALL"]
    if name == "own_pairs":
        assert (tmp_path / "runs" / "own_pairs_small" / "look" / "index.html").exists()
    else:
        checks.validate(given["config"])


def execute(path: pathlib.Path, folder: pathlib.Path, **values: str):
    """Runs a notebook at small scale in a folder."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = changed(cell.source, **values)
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    return notebook


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture
def _alone(monkeypatch):
    """Kernels find this clone, one CPU device, and no settings of this process's tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("_alone")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_they_run(path, tmp_path):
    notebook = execute(path, tmp_path)
    for written in WRITTEN[path.stem]:
        assert (tmp_path / "runs" / written).exists()
    assert pictures(notebook) >= 2


@pytest.mark.slow
@pytest.mark.usefixtures("_alone")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tpu_notebook_trains_a_lora_of_sdxl(tmp_path):
    execute(ROOT / "notebooks" / "kaggle_tpu.ipynb", tmp_path, RUN='"sdxl"')
    run = tmp_path / "runs" / "kaggle_sdxl_small" / "run"
    assert (run / "lora" / "pytorch_lora_weights.safetensors").exists()

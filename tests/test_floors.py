"""Imports only go down, are acyclic inside a folder, and the core needs no other framework."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "dmpo_jax"
FLOORS = [
    {"types", "errors", "extras", "progress", "pages"},
    {"storage"},
    {"locks"},
    {"objectives", "diffusion", "parallel"},
    {"models"},
    {"families"},
    {"diffusers_io", "data"},
    {"toy"},
    {"encoding", "sampling", "scoring", "training", "export", "inspection"},
    {"calibration", "collecting", "evaluation", "planning"},
    {"config"},
    {"jobs"},
    {"commands"},
    {"python", "__main__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
FORBIDDEN = {"torch", "tensorflow", "diffusers"}


def modules() -> dict[str, pathlib.Path]:
    """Dotted name -> file; a folder's `__init__` bears the folder's name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, here: str, known, is_package: bool = False) -> set[str]:
    """The modules that a file names, wherever in it; `from a import b` is a.b if that is one."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = here.split(".")
                up = up[: len(up) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.add(full if full in known else base)
    return names


def ours(path: pathlib.Path, name: str, known) -> set[str]:
    """Returns the package's own modules that a file imports."""
    names = imported(path.read_text(), name, known, path.name == "__init__.py")
    return {n for n in names if n.split(".")[0] == PACKAGE}


def going_up(name: str, imports: set[str]) -> list[str]:
    """The imports that are not strictly below; the package's own `__init__` is below nothing."""
    here = name.split(".")[1]
    others = {i for i in imports if i.split(".")[1:2] != [here]}
    return sorted(i for i in others if i == PACKAGE or FLOOR[i.split(".")[1]] >= FLOOR[here])


def test_every_module_has_a_floor():
    assert {name.split(".")[1] for name in modules() if name != PACKAGE} <= set(FLOOR)


def test_imports_go_down():
    known = modules()
    upwards = {
        name: wrong
        for name, path in known.items()
        if name != PACKAGE and (wrong := going_up(name, ours(path, name, known)))
    }
    assert not upwards


def test_imports_are_acyclic():
    """Inside each folder; between them the floors see to it."""
    known = modules()
    graph = {name: ours(path, name, known) - {name} for name, path in known.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the cycle


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dmpo_jax.parallel.meshes", "from dmpo_jax.training import step"),
        (
            "dmpo_jax.parallel.meshes",
            "def f():\n    from dmpo_jax.models.unet import UNet2DConditionModel",
        ),
        ("dmpo_jax.models.unet", "import dmpo_jax.diffusers_io.weights as w"),
        ("dmpo_jax.diffusion.noise", "from dmpo_jax.objectives import margin"),  # the same floor
        ("dmpo_jax.models.unet", "from ..training import step"),
        ("dmpo_jax.models.unet", "from ..jobs import train"),
        ("dmpo_jax.toy.digits", "import dmpo_jax"),
    ],
)
def test_an_upward_import_is_seen(name, source):
    assert going_up(name, imported(source, name, modules()))


def test_launch_files_only_call_jobs():
    allowed = {PACKAGE, "absl"} | sys.stdlib_module_names
    files = sorted((ROOT / "launch").rglob("*.py"))
    assert files
    for path in files:
        tops = {name.split(".")[0] for name in imported(path.read_text(), "launch", ())}
        assert tops <= allowed, f"{path.name} imports {sorted(tops - allowed)}"


LINES = 120  # of a job: a screen that opens, checks, calls stages and reports
# The command line, and the command `train`, which runs the jobs that a config names.
RUNS_JOBS = ("dmpo_jax.commands", "dmpo_jax.jobs.run")


def test_a_job_is_one_screen():
    long = {
        path.name: lines
        for path in sorted((ROOT / PACKAGE / "jobs").glob("*.py"))
        if (lines := len(path.read_text().splitlines())) > LINES
    }
    assert not long


def importing_jobs(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """The modules that import a job, and which; `RUN_JOBS` may."""
    wrong = {}
    for name, imports in found.items():
        jobs = {i for i in imports if i.startswith("dmpo_jax.jobs")} - {name}
        if jobs and name not in RUNS_JOBS:
            wrong[name] = jobs
    return wrong


def test_nothing_imports_a_job():
    """But for launch/ and the command line, which are not in the package's stages."""
    known = modules()
    assert not importing_jobs({name: ours(path, name, known) for name, path in known.items()})


def test_an_import_of_a_job_is_seen():
    jobs = {"dmpo_jax.jobs.train"}
    found = {
        "dmpo_jax.jobs.plan": jobs,
        "dmpo_jax.planning.plan": jobs,
        **dict.fromkeys(RUNS_JOBS, jobs),
    }
    assert set(importing_jobs(found)) == {"dmpo_jax.jobs.plan", "dmpo_jax.planning.plan"}


# Facts of one kind of model: asked of its family.
FACTS = re.compile(
    "UNet2DCondition|cross_attention_dim|addition_embed_type|time_ids|alphas_cumprod|CLIPTokenizer"
    '|CLIPText|text_encoder_2|"unet"|sample_size|in_channels'
)
MAY_KNOW = {"families", "models", "diffusers_io", "toy"}


def test_few_modules_name_a_fact_of_one_model():
    found = {
        name
        for name, path in modules().items()
        if name.count(".") and name.split(".")[1] not in MAY_KNOW and FACTS.search(path.read_text())
    }
    assert len(found) <= 4, sorted(found)


@pytest.mark.long
def test_core_imports_no_other_framework():
    """Every module imported in a fresh process: PyTorch is what tests compare with."""
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(modules())!r}:\n"
        "    importlib.import_module(name)\n"
        f"print(sorted({FORBIDDEN!r} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"

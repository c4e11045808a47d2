#!/usr/bin/env bash
# Trains on Cloud TPU slices: queues for them, installs on every worker, runs the same command on
# each, and requeues when they are preempted. Run it on your own machine or a small VM:
#
#     NAME=align ZONE=us-central1-a ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite \
#       launch/tpu/train.sh --config=configs/sdxl_dmpo.py --workdir=gs://BUCKET/run ...
#
# SLICES=4 joins four such slices by Multislice (set --config.mesh for it). SPOT= (empty) requests
# capacity that is not preempted. Every worker must have access to the workdir, the model and the
# pairs: gs://, or hub ids. The workers get the last commit, not what is uncommitted. This script
# may be interrupted: training continues without it, and the same command watches it again. It
# ends with training's status, or with 1 if a worker cannot be set up. To end everything:
#
#     gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force
set -euo pipefail

: "${NAME:?a name for the queued resource}" "${ZONE:?such as us-central1-a}"
: "${ACCELERATOR:?such as v5litepod-16}" "${RUNTIME:?such as v2-alpha-tpuv5-lite}"
SLICES=${SLICES:-1} SPOT=${SPOT---spot} POLL=${POLL:-60}
root=$(cd "$(dirname "$0")/../.." && pwd)
commit=$(git -C "$root" rev-parse HEAD)
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
git -C "$root" archive --format=tar.gz --output="$package/dmpo_jax.tar.gz" HEAD
if [[ -n $(git -C "$root" status --porcelain) ]]; then
  echo "train.sh: uncommitted changes stay here; the workers get commit $commit" >&2
fi
tpus=(gcloud compute tpus)

state() {
  "${tpus[@]}" queued-resources describe "$NAME" --zone "$ZONE" --format='value(state.state)' \
    2>/dev/null || echo NONE
}

nodes() {
  if ((SLICES == 1)); then echo "$NAME"; else seq -f "$NAME-%g" 0 $((SLICES - 1)); fi
}

queue() { # returns when the slices are active
  local shape=(--node-id "$NAME")
  ((SLICES == 1)) || shape=(--node-count "$SLICES" --node-prefix "$NAME")
  while :; do
    case $(state) in
      ACTIVE) return ;;
      NONE)
        "${tpus[@]}" queued-resources create "$NAME" --zone "$ZONE" "${shape[@]}" \
          --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME" ${SPOT:+"$SPOT"}
        ;;
      SUSPENDED | FAILED) # preempted: it is not restored by itself
        "${tpus[@]}" queued-resources delete "$NAME" --zone "$ZONE" --force --quiet ||
          true # it may already be being deleted
        ;;
    esac
    sleep "$POLL"
  done
}

everywhere() { # a command on every worker of every slice, at once
  local node jobs=() failed=0
  for node in $(nodes); do
    "${tpus[@]}" tpu-vm ssh "$node" --zone "$ZONE" --worker=all --command="$1" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return "$failed"
}

# On each worker run/lock is held by training and all that it starts, until the last of them ends.
# A search for the process's name would find the shell that searches.

installed() { # this commit is there, or another one is training
  everywhere "cd run && { grep -qsx $commit installed || ! flock -n lock true; }" 2>/dev/null
}

install() { # with a Python of its own: that of most TPU images is too old
  local node
  for node in $(nodes); do
    "${tpus[@]}" tpu-vm scp "$package/dmpo_jax.tar.gz" "$node": --zone "$ZONE" --worker=all ||
      return
  done
  everywhere "mkdir -p run && rm -rf run/build && tar xzf dmpo_jax.tar.gz -C run && cd run \
    && sudo apt-get install -qy python3-venv && python3 -m venv uv && uv/bin/pip install -q uv \
    && uv/bin/uv venv -q --clear --seed --python 3.12 venv \
    && venv/bin/pip install -q --require-hashes -r launch/locks/cpu.txt -r launch/locks/tpu.txt \
    && venv/bin/pip install -q --no-deps . && echo $commit >installed"
}

# In the background there: a lost ssh connection ends nothing. Workers end within seconds of one
# another, so the lock of one that is just ending is waited for.
start() {
  local run
  run="PATH=\$PWD/venv/bin:\$PATH launch/again.sh python launch/train.py $(printf '%q ' "$@")"
  run=$(printf '%q' "$run; echo \$? >status")
  everywhere "cd run && exec 9>>lock && if flock -w $POLL 9; then rm -f status; \
    setsid --fork bash -c $run >>log 2>&1 </dev/null; else echo training runs here already; fi"
}

# Of worker 0 of slice 0, and its last line while there is none. Ended without a status: 75.
status() {
  local first
  first=$(nodes | head -n 1)
  "${tpus[@]}" tpu-vm ssh "$first" --zone "$ZONE" --worker=0 --command='cd run && {
    cat status 2>/dev/null || flock -n lock sh -c "cat status 2>/dev/null || echo 75" ||
    tail -n 1 log >&2; }'
}

failures=0
while :; do
  queue
  if ! { installed || install; } || ! start "$@"; then # preempted meanwhile: queue again
    if [[ $(state) == ACTIVE ]] && ((++failures == 3)); then
      echo "train.sh: the workers cannot be set up; their last messages are above" >&2
      exit 1
    fi
    sleep "$POLL"
    continue
  fi
  failures=0 ended=""
  while [[ ! $ended =~ ^[0-9]+$ && $(state) == ACTIVE ]]; do
    sleep "$POLL"
    ended=$(status || true)
  done
  if [[ $ended =~ ^[0-9]+$ ]] && ! "$root/launch/again.sh" --asks "$ended"; then
    exit "$ended"
  fi
done

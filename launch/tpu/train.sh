#!/usr/bin/env bash
# Trains on Cloud TPU slices: queues for them, installs on every worker, runs the same command on
# each, and requeues when they are preempted. Run it on your own machine or a small VM:
#
#     NAME=align ZONE=us-central1-a ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite \
#       launch/tpu/train.sh --config=configs/sdxl_dmpo.py --workdir=gs://BUCKET/run ...
#
# SLICES=4 joins four such slices by Multislice (set --config.mesh for it). SPOT= (empty) requests
# capacity that is not preempted. Every worker must have access to the workdir, the model and the
# pairs: gs://, or hub ids. This script may be interrupted: training continues without it, and
# the same command watches it again. To end everything:
#
#     gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force
set -euo pipefail

: "${NAME:?a name for the queued resource}" "${ZONE:?such as us-central1-a}"
: "${ACCELERATOR:?such as v5litepod-16}" "${RUNTIME:?such as v2-alpha-tpuv5-lite}"
SLICES=${SLICES:-1} SPOT=${SPOT---spot} POLL=${POLL:-60}
again=$(dirname "$0")/../again.sh
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

install() {
  local node
  git archive --format=tar.gz --output=/tmp/"$NAME".tar.gz HEAD
  for node in $(nodes); do
    "${tpus[@]}" tpu-vm scp /tmp/"$NAME".tar.gz "$node": --zone "$ZONE" --worker=all
  done
  everywhere "mkdir -p run && tar xzf $NAME.tar.gz -C run && cd run \
    && sudo apt-get install -qy python3-venv && python3 -m venv venv \
    && venv/bin/pip install -q '.[tpu,gcs]'"
}

start() { # in the background there: a lost ssh connection ends nothing
  local run
  run="PATH=\$PWD/venv/bin:\$PATH launch/again.sh python launch/train.py $(printf '%q ' "$@")"
  run=$(printf '%q' "$run; echo \$? >status")
  everywhere "cd run && { pgrep -f launch/train.py >/dev/null || \
    setsid --fork bash -c $run >>log 2>&1 </dev/null; }"
}

status() { # of worker 0 of slice 0, and its last line while there is none
  local first
  first=$(nodes | head -n 1)
  "${tpus[@]}" tpu-vm ssh "$first" --zone "$ZONE" --worker=0 \
    --command='cat run/status 2>/dev/null || tail -n 1 run/log >&2'
}

while :; do
  queue
  everywhere "test -e run/venv/bin/pip && test -e run/log" 2>/dev/null || install || continue
  start "$@" || continue  # preempted meanwhile: queue again
  ended=""
  while [[ -z $ended && $(state) == ACTIVE ]]; do
    sleep "$POLL"
    ended=$(status || true)
  done
  if [[ -n $ended ]] && ! "$again" --asks "$ended"; then
    exit "$ended"
  fi
  everywhere "rm -f run/status" || true
done

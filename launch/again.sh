#!/usr/bin/env bash
# Reruns a command while its exit status asks for it:
#
#     launch/again.sh python launch/train.py --config=... --workdir=...
#     launch/again.sh --asks STATUS        # 0 if that status asks for another run, else 1
#
# 75 asks for a rerun (a process was lost or hangs), and so does every status above 128 (ended by
# a signal, or saved after one) but 130, Ctrl-C or an alarm. 0 is done; 1 is an error that a rerun
# would repeat. dmpo_jax/parallel/processes.py has the complete list. On many workers start this on
# each: all processes of a job end together, and join one another again.
#
# AGAIN_MOST (20) is the limit of runs, AGAIN_PAUSE (10) the seconds between two. A SIGTERM to
# this script is passed to the command, which saves, and ends both.
set -u

asks() { (($1 == 75 || ($1 > 128 && $1 != 130))); }

if [[ ${1:-} == --asks ]]; then
  asks "$2"
  exit
fi

stopped=""
child=""
trap 'stopped=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM

for ((run = 1; ; run++)); do
  "$@" &
  child=$!
  # A SIGTERM before that line found no child to pass it to.
  [[ -z $stopped ]] || kill -TERM "$child" 2>/dev/null
  wait "$child"
  status=$?
  # A trap ends `wait` early, with a status of its own.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  if [[ -n $stopped ]] || ! asks "$status"; then
    exit "$status"
  fi
  if ((run >= ${AGAIN_MOST:-20})); then
    echo "again.sh: gave up after $run runs, the last with status $status" >&2
    exit "$status"
  fi
  echo "again.sh: status $status, running again in ${AGAIN_PAUSE:-10} s" >&2
  sleep "${AGAIN_PAUSE:-10}"
  [[ -z $stopped ]] || exit 143
done

#!/usr/bin/env bash
# Trains on a GKE cluster of TPUs with XPK (pip install xpk), in an image of the Dockerfile:
#
#     docker build --build-arg EXTRA=tpu --build-arg RUN_AS=root -t IMAGE . && docker push IMAGE
#     NAME=align CLUSTER=mine ZONE=us-central1-a TPU=v5litepod-16 IMAGE=... \
#       launch/gke/xpk.sh --config=configs/sdxl_dmpo.py --workdir=gs://BUCKET/run ...
#
# SLICES=4 joins four slices by Multislice. XPK restarts on 127 to 255 by itself; 75 is our
# status for a process that was lost or hangs.
set -euo pipefail
: "${NAME:?of the workload}" "${CLUSTER:?}" "${ZONE:?}" "${TPU:?such as v5litepod-16}" "${IMAGE:?}"

xpk workload create \
  --workload "$NAME" --cluster "$CLUSTER" --zone "$ZONE" \
  --tpu-type "$TPU" --num-slices "${SLICES:-1}" \
  --docker-image "$IMAGE" \
  --max-restarts "${AGAIN_MOST:-50}" --restart-on-exit-codes 75 \
  --termination-grace-period-seconds 120 \
  --command "exec python launch/train.py $(printf '%q ' "$@")"

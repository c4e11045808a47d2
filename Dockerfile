# docker build --build-arg EXTRA=tpu -t dmpo_jax:tpu .      # or EXTRA=cuda, for GPUs, or cpu
# docker run dmpo_jax:tpu launch/train.py --config=configs/sd15_dmpo.py:debug --workdir=/tmp/run
#
# The CUDA libraries come with JAX's own wheels; the host brings the driver, and runs the image
# with --gpus=all. TPU hosts need --privileged --net=host --user=0, since a TPU's devices are
# root's. Where --user cannot be given (XPK), build with --build-arg RUN_AS=root.
#
# For another Python take the digest that `docker buildx imagetools inspect python:TAG` prints.
FROM python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c
ARG EXTRA=tpu RUN_AS=dmpo
RUN useradd --create-home --uid 1000 dmpo
WORKDIR /dmpo_jax
# First what changes rarely, so that a change of the code does not install all again.
COPY launch/locks launch/locks/
RUN pip install --no-cache-dir --require-hashes \
    -r launch/locks/cpu.txt -r "launch/locks/${EXTRA}.txt"
COPY setup.py pyproject.toml README.md LICENSE ./
COPY configs configs/
COPY launch launch/
COPY dmpo_jax dmpo_jax/
RUN pip install --no-cache-dir --no-deps --editable . && install -d -o dmpo runs
USER ${RUN_AS}
# Python is process 1 and gets the SIGTERM of a preemption itself.
ENTRYPOINT ["python"]

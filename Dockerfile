# docker build --build-arg EXTRA=tpu -t dmpo_jax:tpu .      # or EXTRA=cuda, for GPUs
# docker run dmpo_jax:tpu launch/train.py --config=configs/sd15_dmpo.py:debug --workdir=/tmp/run
#
# The CUDA libraries come with JAX's own wheels; the host brings the driver, and runs the image
# with --gpus=all. TPU hosts need --privileged --net=host.
FROM python:3.12-slim
ARG EXTRA=tpu
WORKDIR /dmpo_jax
# First what changes rarely, so that a change of the code does not install all again.
COPY setup.py pyproject.toml LICENSE ./
COPY dmpo_jax/__init__.py dmpo_jax/
RUN pip install --no-cache-dir ".[${EXTRA},gcs]" && pip uninstall -y dmpo_jax
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
# Python is process 1 and gets the SIGTERM of a preemption itself.
ENTRYPOINT ["python"]

# Images with a checkout that generates, trains and converts; docs/cloud.md says how they are used.
#
#   docker build --target cpu  --tag dicode-jax:cpu  .
#   docker build --target cuda --tag dicode-jax:cuda .
#
# CUDA's libraries come with jax[cuda12]: of the host it needs the driver and NVIDIA's container toolkit.

FROM python:3.12.11-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /dicode_jax
# A volume at .cache keeps compiled programs and downloads.
RUN useradd --create-home --uid 1000 dicode \
    && mkdir /home/dicode/.cache \
    && chown dicode:dicode /home/dicode/.cache /dicode_jax \
    && python -m venv /opt/venv
COPY --chown=dicode:dicode . .
# More of pyproject.toml's extras, such as data,convert (which brings PyTorch).
ARG EXTRAS=data

FROM base AS cpu
RUN pip install --editable ".[${EXTRAS}]"
USER 1000
CMD ["dicode", "doctor"]

FROM base AS cuda
RUN pip install --editable ".[cuda,${EXTRAS}]"
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
CMD ["dicode", "doctor"]

# Prefect server, worker, predictor, event bridge and registration: one image, so that a deployment's code is the worker's code.
# Context: the root of the repository. `docker compose -f infra/compose.yaml build`

# The patch level floats, so that a rebuild brings the fixes of the base; everything on top of it is locked with hashes.
# To freeze it too: --build-arg BASE=python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
WORKDIR /opt/millstream
# torch first and by plain pip, as in the Makefile. TORCH_OPTIONS may name another index, for a build of it without CUDA.
ARG TORCH_OPTIONS=
RUN /opt/venv/bin/pip install ${TORCH_OPTIONS} torch==2.13.0
COPY requirements.lock requirements-demo.lock ./
RUN /opt/venv/bin/pip install --no-deps --require-hashes -r requirements.lock \
 && /opt/venv/bin/pip install --no-deps --require-hashes -r requirements-demo.lock
COPY pyproject.toml README.md prefect.yaml ./
COPY ml ml
COPY solutions solutions
COPY tasks tasks
COPY flows flows
COPY services services
COPY cli cli
COPY data_contracts data_contracts
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation --editable .

FROM ${BASE}
# Prefect may ask git where a deployment's code comes from, and does not expect that there is none.
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home millstream && install -d -o millstream -g millstream /state /state/prefect
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=root:root /opt/millstream /opt/millstream
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false GX_ANALYTICS_ENABLED=false HF_HUB_DISABLE_TELEMETRY=1 \
    MILLSTREAM_STATE_DIR=/state PREFECT_HOME=/state/prefect
WORKDIR /opt/millstream
USER 10001
# Named volumes take their owner from here.
VOLUME /state
CMD ["python", "-c", "raise SystemExit('name a command; see infra/compose.yaml')"]

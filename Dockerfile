# syntax=docker/dockerfile:1
# Serves the champion of a mounted workspace, as its owner and at its own path, since MLflow's database holds paths:
#   docker build --tag moa .
#   docker run --publish 8000:8000 --env MOA_API_KEY --user "$(id -u):$(id -g)" --volume "$PWD:$PWD" --workdir "$PWD" moa
# For torch without CUDA: --build-arg PIP_EXTRA_INDEX_URL=ADDRESS of an index that has it.
FROM python:3.12-slim AS build
ARG PIP_EXTRA_INDEX_URL
WORKDIR /source
COPY . .
RUN python -m venv /opt/moa \
    && /opt/moa/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM python:3.12-slim
# git and gcc: moa reads the workspace's commits, and compiles its C kernels when they are first needed.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --mode=1777 /home/moa
COPY --from=build /opt/moa /opt/moa
ENV PATH=/opt/moa/bin:$PATH \
    HOME=/home/moa \
    LOGNAME=moa \
    DO_NOT_TRACK=1 \
    DVC_NO_ANALYTICS=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false
USER 1000:1000
WORKDIR /workspace
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["moa"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

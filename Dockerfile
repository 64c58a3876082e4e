# syntax=docker/dockerfile:1.10
# Two images from one file: the default runs on the CPU; `--target gpu` brings CUDA's libraries (docs/adr/0007).
# The locked dependencies and the product itself are installed as packages into /opt/idem: no source tree is left in the
# image, so a volume mounted anywhere hides no code.

FROM ghcr.io/astral-sh/uv:0.13.8 AS uv

FROM python:3.12.15-slim-bookworm AS source
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PROJECT_ENVIRONMENT=/opt/idem \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never
WORKDIR /src
COPY pyproject.toml uv.lock README.md ./

# Dependencies first: this layer is kept until the lock changes.
FROM source AS build-cpu
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --frozen --no-dev --extra fast --no-install-project
COPY app app
COPY workers workers
COPY storage storage
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --frozen --no-dev --extra fast --no-editable

# faiss-gpu and onnxruntime-gpu carry the same modules as their CPU twins, which therefore must not be there.
FROM source AS build-gpu
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --frozen --no-dev --no-install-project --extra fast --extra gpu \
    --no-install-package faiss-cpu --no-install-package onnxruntime
COPY app app
COPY workers workers
COPY storage storage
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --frozen --no-dev --no-editable --extra fast --extra gpu \
    --no-install-package faiss-cpu --no-install-package onnxruntime

FROM python:3.12.15-slim-bookworm AS runtime
# A number, so that Kubernetes can see that it is not root; the volumes' folders belong to it.
RUN groupadd --gid 10001 idem \
    && useradd --uid 10001 --gid idem --no-create-home --home-dir /var/lib/idem --shell /usr/sbin/nologin idem \
    && install --directory --owner=idem --group=idem --mode=0700 \
        /var/lib/idem /var/lib/idem/photos /var/lib/idem/index /var/lib/idem/index-copies /var/lib/idem/models \
        /var/lib/idem/evidence
ENV PATH=/opt/idem/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ENVIRONMENT=production \
    API_HOST=0.0.0.0 \
    API_PORT=8000 \
    STORAGE_PATH=/var/lib/idem/photos \
    VECTOR_DB_PATH=/var/lib/idem/index \
    INDEX_CACHE_PATH=/var/lib/idem/index-copies \
    EVIDENCE_PATH=/var/lib/idem/evidence \
    NUMBA_CACHE_DIR=/tmp/numba \
    MODEL_DIR=/var/lib/idem/models
WORKDIR /var/lib/idem
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Of the API; who runs `idem worker` switches it off. The port is read here, for API_PORT may be set.
HEALTHCHECK --interval=10s --timeout=4s --start-period=60s --start-interval=1s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['API_PORT']}/health\", timeout=3)"]
CMD ["idem", "serve"]

FROM runtime AS gpu
COPY --from=build-gpu /opt/idem /opt/idem

FROM runtime AS cpu
COPY --from=build-cpu /opt/idem /opt/idem

# Image of `slipway serve`, built from this tree alone: `docker build -t slipway .`
# EXTRA chooses JAX's accelerator: nothing for CPUs, `tpu` for TPUs, `cuda` for NVIDIA GPUs. An extra name is refused by pip.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG EXTRA=
# the compiler of the CPU kernels
RUN apt-get update && apt-get install --yes --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY csrc csrc
COPY slipway slipway
RUN python -m venv /opt/slipway
RUN CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) /opt/slipway/bin/pip install --no-cache-dir ".${EXTRA:+[$EXTRA]}"
# the extension must be there: without it the server would run, several times slower
RUN cd / && /opt/slipway/bin/python -c "from slipway import native; assert native.library() is not None"

FROM python:${PYTHON}-slim
COPY --from=build /opt/slipway /opt/slipway
# compiled programs and checkpoints; writable for whatever user the container is given
RUN mkdir -p -m 1777 /cache
ENV PATH=/opt/slipway/bin:$PATH HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
WORKDIR /cache
VOLUME /cache
USER 10001:10001
EXPOSE 8000
# /livez answers as soon as the HTTP process runs; a model that is still compiling is not unhealthy
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["slipway"]
CMD ["serve", "--host", "0.0.0.0"]

# LLaVA Sieve with the CUDA stack, for kuberay.yaml or `docker run`. NOT BUILT HERE (no Docker, no
# GPU); the steps are those of `make install GPU=1`. From the repository's top:
#
#   docker build -t llava-sieve .
#   docker run --gpus all --ipc=host -p 127.0.0.1:8000:8000 llava-sieve \
#       python -m serving --host 0.0.0.0 --model llava-hf/llava-1.5-7b-hf

# devel: vLLM's kernels are partly compiled at first use. CUDA must not be newer than the driver's.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${CUDA_IMAGE}

# wget is what KubeRay's probes call.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc python3 python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 sieve \
    && install -d -o sieve -g sieve /app /opt/venv

USER sieve
WORKDIR /app
COPY --chown=sieve pyproject.toml README.md LICENSE ./
COPY --chown=sieve setup setup
COPY --chown=sieve patches patches
COPY --chown=sieve train train
COPY --chown=sieve bench bench
COPY --chown=sieve serving serving

# pip resolves the CUDA stack on the day of the build; Ray stays at the lock's version, which
# kuberay.yaml names. s3fs: adapters in an object store.
RUN grep -oE '^ray==[0-9.]+' setup/lock.txt > /tmp/ray-version.txt \
    && export PIP_CONSTRAINT=/tmp/ray-version.txt PIP_NO_CACHE_DIR=1 \
    && python3 setup/install.py --gpu --venv /opt/venv \
    && /opt/venv/bin/pip install s3fs
ENV PATH=/opt/venv/bin:$PATH

EXPOSE 8000
CMD ["python", "-m", "serving", "--host", "0.0.0.0"]

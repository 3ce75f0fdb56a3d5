# The template, ready to train: docs/install.md. For an accelerator: --build-arg EXTRA=cuda12
FROM python:3.13-slim
ARG EXTRA=
WORKDIR /app

# What is installed comes first: these layers are kept until versions or the library change.
COPY constraints-py312.txt pyproject.toml README.md LICENSE ./
# A fork without packages/ takes this line away, and `-e packages/linen-nnx` from the next.
COPY packages packages
RUN python -m pip install --no-cache-dir -c constraints-py312.txt \
    -e packages/linen-nnx -e ".${EXTRA:+[$EXTRA]}"

COPY . .
CMD ["python", "train.py"]

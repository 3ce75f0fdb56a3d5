"""`python -m linen_nnx` is the command `linen-nnx`."""

from linen_nnx.cli import program

if __name__ == "__main__":
    raise SystemExit(program())

"""Translates checkpoints between Flax Linen and Flax NNX; `python convert.py --help` says how."""

from linen_nnx.cli import program

if __name__ == "__main__":
    raise SystemExit(
        program(own_runs="training.proof:subject", own_files="training.runtime.vouching:check")
    )

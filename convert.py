"""Translates checkpoints between Flax Linen and Flax NNX; `python convert.py --help` says how."""

from linen_nnx.cli import program

if __name__ == "__main__":
    # The library knows no runs of this template: these two say what there is to know.
    raise SystemExit(
        program("convert.py", runs="training.runtime.runs:RUNS", build="training.proof:subject")
    )

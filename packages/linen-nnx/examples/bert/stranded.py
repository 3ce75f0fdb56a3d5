"""Writes a `flax_model.msgpack` with the tree of FlaxBertForPreTraining and random weights.

    python examples/bert/stranded.py runs/bert/flax_model.msgpack [--base]

With `--base` it has the size of BERT base, 440 MB, else a small one.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import to_bytes
from linen_bert import BASE, SMALL, BertForPreTraining


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--base", action="store_true", help="the size of BERT base")
    args = parser.parse_args()
    model = BertForPreTraining(BASE if args.base else SMALL)
    tokens = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens, tokens == 0)["params"]
    rng = np.random.default_rng(0)  # every leaf random: no two alike, no bias zero
    params = jax.tree.map(lambda x: 0.05 * rng.standard_normal(x.shape, np.float32), shapes)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    args.file.write_bytes(to_bytes(params))
    print(f"{args.file}: {len(jax.tree.leaves(params))} leaves, ", end="")
    print(f"{args.file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

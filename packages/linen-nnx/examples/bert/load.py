"""Restores the converted weights with stock Orbax and asks both models the same.

python examples/bert/load.py runs/bert/flax_model.msgpack runs/bert/nnx [--base]
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from flax.serialization import msgpack_restore
from linen_bert import BASE, SMALL, BertForPreTraining
from nnx_bert import Bert


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path, help="the msgpack file")
    parser.add_argument("converted", type=Path, help="what linen-nnx made of it")
    parser.add_argument("--base", action="store_true", help="the size of BERT base")
    args = parser.parse_args()
    cfg = BASE if args.base else SMALL

    model = nnx.eval_shape(lambda: Bert(cfg, rngs=nnx.Rngs(0)))
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(model, checkpointer.restore(args.converted.absolute(), nnx.state(model)))

    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(1, cfg.vocab, (2, 16)))
    types = jnp.asarray(rng.integers(0, 2, (2, 16)))
    mask = jnp.arange(16) < jnp.array([[16], [11]])
    params = msgpack_restore(args.file.read_bytes())
    old = jax.jit(BertForPreTraining(cfg).apply)({"params": params}, tokens, types, mask)
    new = nnx.jit(Bert.__call__)(model, tokens, types, mask)
    for name, one, two in zip(("word scores", "next sentence"), old, new, strict=True):
        same = np.asarray(one).tobytes() == np.asarray(two).tobytes()
        print(f"{name}: {'every bit equal' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()

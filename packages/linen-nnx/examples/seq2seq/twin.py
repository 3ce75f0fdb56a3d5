"""Both models and an example of their input: for `linen-nnx`. Only `verify` uses the optimizer."""

from dates import ALPHABET, Batch, batch, optimizer, shifted
from linen_seq2seq import Seq2Seq as LinenSeq2Seq
from nnx_seq2seq import Seq2Seq as NnxSeq2Seq

from linen_nnx import Twin


def _inputs() -> Batch:
    source, lengths, target = batch(0, 3)
    return source, lengths, shifted(target)


twin = Twin(
    linen=lambda: LinenSeq2Seq(len(ALPHABET)),
    nnx=lambda rngs: NnxSeq2Seq(len(ALPHABET), rngs=rngs),
    inputs=_inputs,
    optimizer=optimizer(),
)

"""Both models and an example of their input: all that `convert.py suggest` needs."""

from dates import ALPHABET, batch, shifted
from linen_seq2seq import Seq2Seq as LinenSeq2Seq
from nnx_seq2seq import Seq2Seq as NnxSeq2Seq

from linen_nnx import Twin


def _inputs():
    source, lengths, target = batch(0, 3)
    return source, lengths, shifted(target)


twin = Twin(
    linen=lambda: LinenSeq2Seq(len(ALPHABET)),
    nnx=lambda rngs: NnxSeq2Seq(len(ALPHABET), rngs=rngs),
    inputs=_inputs,
)

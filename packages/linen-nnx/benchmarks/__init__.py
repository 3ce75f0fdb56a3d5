"""Measurements and proofs that are run by hand: `make bench` and `make parity`."""

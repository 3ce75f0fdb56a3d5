"""Twins: two models traced, their parameters paired on evidence, a rule book proposed."""

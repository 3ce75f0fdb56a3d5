"""Worked migrations; README.md lists them."""

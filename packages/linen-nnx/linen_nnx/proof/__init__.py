"""Conversions verified by running both models; the first layer at which two models part."""

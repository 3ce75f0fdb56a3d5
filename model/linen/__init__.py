"""The Linen twins. Once the last rung is climbed, this folder can be deleted."""

"""Rule books: their grammar, and what they make of shapes and arrays. Imports no jax."""

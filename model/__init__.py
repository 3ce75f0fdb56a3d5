"""What a fork replaces: the model families, each with a Linen and an nnx twin, and the four stages."""

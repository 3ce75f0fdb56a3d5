"""What a fork replaces: the model families, with a Linen and an nnx twin each, and the stages."""

"""What a stranger has: a Linen model, a script that trains it, and a family made of that model."""

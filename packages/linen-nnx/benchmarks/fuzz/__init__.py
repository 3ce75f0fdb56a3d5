"""Damages checkpoints, runs and rule books, and looks at what their readers say."""

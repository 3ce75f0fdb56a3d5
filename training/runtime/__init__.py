"""What makes a run exact: start, checkpoints, metrics, mesh, processes. Not yours to change."""

"""What starts a run and keeps it alive: processes, signals, checkpoints, metrics."""

"""What a worker does: checkpoints, methods, tasks, the merge worker. Importable without ray."""

"""Training: one step, its checkpoints, its log, its folder. Imported by commands only."""

"""Floor 5: optimiser groups, checkpoints, logs, interrupts, launch; imported by submodule."""

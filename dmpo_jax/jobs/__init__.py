"""The commands' jobs, one per module; `run` executes those that a config names."""

"""What the launch scripts call, a module a job; `run` does those that a config names."""

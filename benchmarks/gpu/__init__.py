"""Every figure that a GPU is needed for, by one command: `python -m benchmarks.gpu`."""

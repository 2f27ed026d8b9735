"""The machine: its CPU, memory and files. Knows nothing of models."""

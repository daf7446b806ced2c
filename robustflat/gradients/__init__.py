"""Gradient rules: at which weights the gradient of a step is taken."""

"""Attacks on images: callables that maximise an objective of the logits inside a ball."""

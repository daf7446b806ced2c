"""From a network and data to logits, and from logits to numbers."""

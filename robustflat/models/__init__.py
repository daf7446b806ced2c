"""Networks that take images in [0, 1], and what is done to a network from outside."""

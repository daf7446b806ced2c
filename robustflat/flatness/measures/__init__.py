"""Sharpness measures of the literature, on clean, frozen-adversarial or re-attacked loss, behind one protocol."""

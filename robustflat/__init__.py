"""robustflat: train, attack and measure adversarially robust networks."""

__version__ = "0.1.0"

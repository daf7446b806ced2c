"""Flatness of the clean and of the robust loss in weight space."""

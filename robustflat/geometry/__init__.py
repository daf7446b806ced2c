"""Input and weight balls: where a perturbation may go."""

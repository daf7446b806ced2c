"""Where metrics go: JSON lines, Weights & Biases, the terminal."""

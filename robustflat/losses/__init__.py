"""Training losses: how the adversarial batch is crafted and how it is scored."""

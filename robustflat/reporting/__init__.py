"""Pictures and tables made of stored results."""

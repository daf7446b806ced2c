"""List run folders."""

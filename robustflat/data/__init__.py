"""Data sets as uint8 tensors on the device, their augmentation and their files."""

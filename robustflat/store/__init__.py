"""Results on disk: one HDF5 file per run, and tidy tables over many runs."""

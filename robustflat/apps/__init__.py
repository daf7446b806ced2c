"""The applications: the only rooms that know Hydra and the file system of a run."""

"""A short benchmark that a user can run; the long ones are in `benchmarks/`."""

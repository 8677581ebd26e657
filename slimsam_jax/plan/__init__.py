"""Plans a compression for hardware that is not here: its programs, compiled by XLA for a description of the devices."""

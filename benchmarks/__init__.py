"""Dense against sparse: the reference implementation, and the commands that time it."""

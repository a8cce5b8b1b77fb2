"""Published programs on the same slides: each in an environment of its own, one scorer for all."""

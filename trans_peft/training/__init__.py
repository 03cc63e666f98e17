"""Train one adapter on one base, in child processes that accelerate starts."""

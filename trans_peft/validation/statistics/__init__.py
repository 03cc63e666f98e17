"""Statistics of paired results: score intervals, sequential tests, power."""

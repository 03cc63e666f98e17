"""Recovery strategies for adapters that do not pass with direct transfer."""

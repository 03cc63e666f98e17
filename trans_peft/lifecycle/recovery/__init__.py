"""Recovery strategies for adapters that direct transfer does not carry over."""

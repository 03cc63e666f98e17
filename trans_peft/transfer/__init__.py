"""Carry an adapter's bytes to another base: compatibility, transplant, effect probe."""

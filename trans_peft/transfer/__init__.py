"""Load an adapter on another base version: compatibility, rebinding, effect probe."""

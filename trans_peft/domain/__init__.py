"""The nouns: frozen dataclasses that check themselves. Standard library only."""

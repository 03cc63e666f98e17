"""Text and token ids: tokenizers that hashes cover, and chat templates that read no clock."""

"""Load tokenizers reproducibly, and render chat templates with a fixed date."""

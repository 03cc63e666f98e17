"""Base versions: publish an upload, verify one, and know what an adapter can feel of it."""

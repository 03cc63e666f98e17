"""Base models: publish and verify uploads, compute fingerprints, and cache verified copies."""

"""The demo, `make demo`: an adapter from training to an update of its base, on one machine."""

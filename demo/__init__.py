"""The whole life of an adapter on one machine: `make demo` and `make demo-full`."""

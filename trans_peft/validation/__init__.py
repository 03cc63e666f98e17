"""Judge an adapter: suites, generation, scoring, and the gate's statistics."""

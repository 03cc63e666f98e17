"""The story: order, branching, failure isolation. Knows tasks and the nouns."""

"""Serve adapters by verdict: an adapter answers on a base only where its version serves there."""

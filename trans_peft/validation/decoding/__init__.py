"""Greedy decoding and likelihoods for many adapters on one base."""

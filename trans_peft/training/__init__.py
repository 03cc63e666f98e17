"""Fit one adapter on one base, in a child process started by accelerate."""

"""Benchmarks. results.json has their figures.

This file makes the folder a regular package: opacus installs a package with the same name.
"""

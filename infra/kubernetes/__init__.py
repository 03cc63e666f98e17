"""Kubernetes manifests, and the program that writes their secrets."""

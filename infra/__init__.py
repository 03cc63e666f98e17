"""Runs the platform: on one machine, in containers, on Kubernetes. Contains no machine learning."""

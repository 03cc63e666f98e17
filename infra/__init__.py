"""How the platform is run: on one machine, in containers, on Kubernetes. No ML here."""

"""Which adapters exist: every PEFT method by its own name, and the Houlsby bottleneck adapter."""

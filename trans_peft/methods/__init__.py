"""Adapter methods: those of PEFT, and the Houlsby bottleneck adapter."""

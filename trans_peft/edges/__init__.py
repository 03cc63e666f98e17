"""Implementations of `trans_peft.ports` with MLflow, S3, local files and memory."""

"""The Prefect flows: order of the tasks, branches, and isolation of failures."""

"""Images of the programs, and their deployment with Docker Compose."""

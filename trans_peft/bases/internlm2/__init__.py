"""Convert InternLM2 checkpoints to the Llama layout without running the code that they contain."""

"""Does Trans-PEFT help? One study that anyone can run again: `make study`.

SmolLM2-135M, two updates of it made by continual training, two tasks mined from the installed
Python packages. Every adapter is trained and scored by the library itself, the way a flow does it.
"""

"""A reproducible study of the effect of Trans-PEFT: `make study`.

It has SmolLM2-135M, two updates of it by further training, and two tasks from the source of the
installed Python packages. The library trains and scores every adapter, as the flows do.
"""

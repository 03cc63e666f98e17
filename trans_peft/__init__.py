"""Trans-PEFT: adapters that survive an update of their base model.

The method is Gu et al., "Adapt Once, Thrive with Updates" (ACL 2025). This is the
knowledge: it works in a notebook, without Prefect, MLflow or S3. Importing it imports nothing
heavy.
"""

__version__ = "0.1.0"

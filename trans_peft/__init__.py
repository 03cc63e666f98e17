"""Trans-PEFT: PEFT adapters that lose less accuracy when their base is updated.

The method is Gu et al., "Adapt Once, Thrive with Updates" (ACL 2025). The library works without
Prefect, MLflow and S3; `connect` adds MLflow and S3.

Importing the package is cheap: each public name loads its module on first use.

>>> import trans_peft as tp
>>> tp.Perturbation(masking_p=0.1, dropping_p=0.1).masking_p
0.1
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trans_peft.client import connect
    from trans_peft.domain.compute import ComputeSettings
    from trans_peft.domain.data import DataSource, TrainingSource
    from trans_peft.domain.evaluation import Evaluation, GatePolicy, Suite, Verdict
    from trans_peft.domain.optimizer import OptimizerSettings
    from trans_peft.domain.recipe import Perturbation, TrainingRecipe
    from trans_peft.domain.spec import AdapterSpec
    from trans_peft.domain.validation import ValidationSettings
    from trans_peft.errors import TransPeftError
    from trans_peft.lifecycle.resolve import resolve
    from trans_peft.perturbation import Layout, PerturbationHandle, perturbed
    from trans_peft.ports import Platform

__all__ = [
    "AdapterSpec",
    "ComputeSettings",
    "DataSource",
    "Evaluation",
    "GatePolicy",
    "Layout",
    "OptimizerSettings",
    "Perturbation",
    "PerturbationHandle",
    "Platform",
    "Suite",
    "TrainingRecipe",
    "TrainingSource",
    "TransPeftError",
    "ValidationSettings",
    "Verdict",
    "connect",
    "perturbed",
    "resolve",
]

__version__ = "0.1.0"

_MODULE_OF = {
    "AdapterSpec": "domain.spec",
    "ComputeSettings": "domain.compute",
    "DataSource": "domain.data",
    "Evaluation": "domain.evaluation",
    "GatePolicy": "domain.evaluation",
    "Layout": "perturbation",
    "OptimizerSettings": "domain.optimizer",
    "Perturbation": "domain.recipe",
    "PerturbationHandle": "perturbation",
    "Platform": "ports",
    "Suite": "domain.evaluation",
    "TrainingRecipe": "domain.recipe",
    "TrainingSource": "domain.data",
    "TransPeftError": "errors",
    "ValidationSettings": "domain.validation",
    "Verdict": "domain.evaluation",
    "connect": "client",
    "perturbed": "perturbation",
    "resolve": "lifecycle.resolve",
}


def __getattr__(name: str) -> Any:
    """Load the module of a public name on first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trans_peft.extras import explaining_missing_extras

    with explaining_missing_extras():
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

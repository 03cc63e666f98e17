"""What a base update did to the base: measured between two versions, without any data."""

from trans_peft.analysis.drift import Drift, weight_drift

__all__ = ["Drift", "weight_drift"]

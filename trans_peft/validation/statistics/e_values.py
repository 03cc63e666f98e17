"""Control the share of wrong results among the adapters that pass, for any dependence between them.

An e-value is a nonnegative statistic whose mean is at most 1 if the hypothesis is true. The wealth
of a betting test divided by its level is one at any stopping time. The e-BH procedure rejects the k
hypotheses with the largest e-values, for the largest k for which all of them are at least K / (q k)
of K hypotheses. The expected share of true hypotheses among the rejected ones (the false discovery
rate) is then at most q. It needs no independence: verdicts on adapters share suites and a base.

Source: R. Wang and A. Ramdas, "False discovery rate control with e-values", JRSS B 84 (2022)
822-852.
"""

from collections.abc import Mapping

__all__ = ["e_bh"]


def e_bh(e_values: Mapping[str, float], hypotheses: int, fdr: float) -> frozenset[str]:
    """Return the names whose hypotheses e-BH rejects at the target `fdr`.

    `hypotheses` is the number of all hypotheses. Those without an e-value count as 0.
    """
    ranked = sorted(e_values, key=lambda name: -e_values[name])
    count = 0
    for k, name in enumerate(ranked, start=1):
        if e_values[name] * fdr * k >= hypotheses * (1 - 1e-9):
            count = k
    return frozenset(ranked[:count])

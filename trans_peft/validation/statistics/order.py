"""The order in which betting tests observe the items of a suite, and the clusters of the items."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import accumulate

from trans_peft.domain.evaluation import ItemResult
from trans_peft.domain.identity import content_sha256
from trans_peft.validation.statistics.betting import lower_confidence_limit

__all__ = ["SuiteClusters", "cluster_of", "order", "order_seed"]


def order_seed(suite_sha256: str, base_fingerprint_sha256: str) -> str:
    """Return the seed of a suite's order on a base.

    The seed is derived from hashes, so it cannot be chosen. All adapters and the bare base have the
    same seed on a base, so they can share stored answers.
    """
    return content_sha256(["order", suite_sha256, base_fingerprint_sha256])


def order(
    ids: Iterable[str], seed: str, clusters: Mapping[str, Hashable] | None = None
) -> tuple[str, ...]:
    """Return the ids in a pseudo-random order that depends on the ids and the seed only.

    `clusters` are the clusters by id. The ids of a cluster follow each other; its place is that of
    its smallest id.
    """
    ids = sorted(ids)
    first: dict[Hashable, str] = {}
    if clusters is not None:
        for id_ in ids:
            first.setdefault(clusters[id_], id_)

    def key(id_: str) -> tuple[bytes, str, str]:
        place = id_ if clusters is None else first[clusters[id_]]
        return sha256(f"{seed} {place}".encode()).digest(), place, id_

    return tuple(sorted(ids, key=key))


def cluster_of(item: ItemResult) -> tuple[str, str]:
    """Return the cluster of an item. An item without a cluster is one of its own."""
    return (item.cluster, "") if item.cluster else ("", item.id)


class SuiteClusters:
    """The clusters of a suite, in the order in which its items are evaluated.

    Attributes:
        numbers: number of the cluster of each item, ascending from 0.
        count: number of clusters.
        mean_weight: mean of the clusters' weights, 1 if all clusters have the same size.
        ends: numbers of items after which a cluster is complete.
    """

    def __init__(self, clusters: Sequence[Hashable]) -> None:
        numbers: dict[Hashable, int] = {}
        self.numbers = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
        self.count = len(numbers)
        sizes = Counter(self.numbers)
        self._sizes = [sizes[number] for number in range(self.count)]
        self._largest = max(self._sizes)
        self.mean_weight = sum(self._sizes) / self._largest / self.count
        self.ends = list(accumulate(self._sizes))

    @property
    def are_single(self) -> bool:
        """Whether no cluster has two items."""
        return self.count == len(self.numbers)

    def complete(self, items: int) -> int:
        """Return the number of items in the complete clusters among the first `items` items."""
        clusters = bisect_right(self.ends, items)
        return self.ends[clusters - 1] if clusters else 0

    def end_after(self, items: int) -> int:
        """Return the number of items at which the cluster of item `items` ends."""
        return self.ends[min(bisect_left(self.ends, items), self.count - 1)]

    def bets(self, changes: Sequence[float], start: int = 0) -> list[tuple[float, float]]:
        """Return the mean and the weight of each complete cluster.

        `changes` are those of the first items of complete clusters. `start` is the number of items
        in the clusters to leave out.
        """
        found = []
        for size in self._sizes[bisect_right(self.ends, start) :]:
            if start >= len(changes):
                break
            mean = sum(changes[start : start + size]) / size
            found.append((mean, size / self._largest))
            start += size
        return found

    def lower_limit(
        self,
        values: Sequence[float],
        threshold: float,
        alpha: float,
        effect: float,
        *,
        unit_steps: bool = True,
    ) -> float:
        """Return `lower_confidence_limit` of values of the first items, by cluster.

        `unit_steps`: whether the values are -1, 0 or 1.
        """
        return lower_confidence_limit(
            self.bets(values),
            threshold,
            items=self.count,
            alpha=alpha,
            effect=effect * self.mean_weight,
            unit_steps=unit_steps and self.are_single,
        )

"""Random choices of a differentially private training, and the noise that its guarantee needs.

Rows, noise and the seeds of dropout are drawn from a secret key and the step. So a resumed run
draws the same numbers, and they cannot be computed from the recipe, whose seed is public.
"""

import warnings
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from trans_peft.domain.privacy import PrivacySettings
from trans_peft.errors import InvalidSpecError
from trans_peft.extras import explaining_missing_extras

__all__ = ["DpSgd", "noise_multiplier"]

_TOLERANCE = 0.01  # relative error of epsilon, to the safe side


@dataclass(frozen=True)
class DpSgd:
    """The parameters of DP-SGD (Abadi et al. 2016, algorithm 1) with Poisson sampling.

    Attributes:
        noise_multiplier: standard deviation of the noise, divided by `clip`.
        clip: norm to which the gradient of one row is clipped.
        batch_size: expected number of rows of a step.
        sampling_rate: probability of each row to be drawn in a step.
        key: secret of 32 hexadecimal digits, from which all random numbers of the steps are drawn.
    """

    noise_multiplier: float
    clip: float
    batch_size: int
    sampling_rate: float
    key: str = field(repr=False)

    @classmethod
    def meeting(cls, settings: PrivacySettings, rows: int, steps: int, key: str) -> "DpSgd":
        """Return the parameters with which training on so many rows meets the settings.

        Raises what `noise_multiplier` raises.
        """
        noise = noise_multiplier(settings, rows, steps)
        size = settings.batch_size
        return cls(noise, settings.clip, size, size / rows, key)

    def rows_of_steps(self, rows: int, steps: int) -> list[list[int]]:
        """Return the row numbers of each step. A step may have none."""
        generator = self._generator(0)
        return [
            np.flatnonzero(generator.random(rows) < self.sampling_rate).tolist()
            for _ in range(steps)
        ]

    def noise(self, step: int, sizes: list[int]) -> list[NDArray[np.float32]]:
        """Return the noise of a step (from 1): a vector for each of the sizes, in float32."""
        generator = self._generator(step)
        scale = np.float32(self.noise_multiplier * self.clip)
        return [scale * generator.standard_normal(size, dtype=np.float32) for size in sizes]

    def seed(self, step: int, row: int) -> int:
        """Return the seed of the random numbers, such as dropout, for a row in a step (from 1).

        The other rows of the step do not change it. If all rows shared one sequence of numbers with
        a public seed, a row would change the gradients of the rows after it, and `clip` would not
        bound its effect.
        """
        entropy = [int(self.key, 16), step, 1 + row]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    def _generator(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([int(self.key, 16), stream])


@cache
def noise_multiplier(settings: PrivacySettings, rows: int, steps: int) -> float:
    """Return the least noise multiplier, to 1 % of epsilon, that meets the settings.

    Computed by the PRV accountant (Gopi et al. 2021) of Opacus, which returns upper bounds of
    epsilon. ModuleNotFoundError without Opacus; InvalidSpecError if the rows are too few for
    `delta` or `batch_size`, or no noise is large enough.
    """
    problems = []
    if settings.delta >= 1 / rows:
        problems.append(
            f"delta={settings.delta:g} must be less than 1 / rows = {1 / rows:.3g}: it would allow "
            "a whole row to be published"
        )
    if settings.batch_size > rows:
        problems.append(f"batch_size={settings.batch_size} must be at most the {rows} rows")
    if problems:
        raise InvalidSpecError(f"the privacy of {rows} rows is invalid: {'; '.join(problems)}")
    with explaining_missing_extras():
        from opacus.accountants.utils import get_noise_multiplier
    tolerance = _TOLERANCE * settings.epsilon
    with warnings.catch_warnings():
        # They concern a first estimate, and log(0) = -inf if every row is in every step.
        warnings.simplefilter("ignore")
        try:
            return get_noise_multiplier(
                target_epsilon=settings.epsilon,
                target_delta=settings.delta,
                sample_rate=settings.batch_size / rows,
                steps=steps,
                accountant="prv",
                epsilon_tolerance=tolerance,
                eps_error=tolerance,
            )
        except ValueError as error:
            raise InvalidSpecError(
                f"no noise gives epsilon={settings.epsilon:g} and delta={settings.delta:g} in "
                f"{steps} steps",
                found=error,
                do="raise epsilon or delta, or lower steps or batch_size",
            ) from error

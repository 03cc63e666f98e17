"""The PEFT config of a bottleneck adapter."""

from dataclasses import dataclass

from peft import PeftConfig

from trans_peft.methods.bottleneck.peft_type import BOTTLENECK

__all__ = ["NON_LINEARITIES", "BottleneckConfig"]

NON_LINEARITIES = ("relu", "gelu", "silu", "tanh")


@dataclass
class BottleneckConfig(PeftConfig):
    """Config of the Houlsby adapter: `h <- h + W_up f(W_down h)` after a sub-layer (eq. 2).

    ValueError for a value out of range.

    Attributes:
        bottleneck_dim: b, the width between W_down (b, d) and W_up (d, b).
        non_linearity: f, one of `NON_LINEARITIES`.
        target_modules: the sub-layers that an adapter follows, as ends of names or as a regular
            expression. Default: attention and FFN, for the model types in `BottleneckModel`.
        exclude_modules: targets to leave out.
        modules_to_save: modules to train and save whole.
        init_bottleneck_weights: whether W_up starts at zero, so that a new adapter changes nothing.
        compensated_modules: names of linear modules that are compensated for an update of the base,
            see `CompensatedLinear`. They are trained with the rest.
        compensation_rank: rank of their matrices.
    """

    bottleneck_dim: int = 64
    non_linearity: str = "relu"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_bottleneck_weights: bool = True
    compensated_modules: list[str] | None = None
    compensation_rank: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        problems = []
        if self.bottleneck_dim < 1:
            problems.append(f"bottleneck_dim must be at least 1, not {self.bottleneck_dim}")
        if self.non_linearity not in NON_LINEARITIES:
            problems.append(
                f"non_linearity must be one of {NON_LINEARITIES}, not {self.non_linearity!r}"
            )
        if self.compensation_rank < 1:
            problems.append(f"compensation_rank must be at least 1, not {self.compensation_rank}")
        if problems:
            raise ValueError("; ".join(problems))

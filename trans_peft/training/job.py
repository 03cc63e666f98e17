"""One training run as a value: what goes into the child process, and what comes out of it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from trans_peft.domain.identity import content_sha256
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.errors import InvalidSpecError, NotFoundError
from trans_peft.files import atomic_write
from trans_peft.models import adapter_weights_sha256

__all__ = ["TrainingJob", "TrainingResult"]


@dataclass(frozen=True)
class TrainingJob:
    """A recipe with everything it names brought to this machine.

    `data_file` holds the rows as JSON Lines (`trans_peft.data.write_examples`). `base_name` and
    `base_revision` are what the saved adapter says about its base. Everything that the run writes
    stays below `work_dir`: its checkpoints, `result.json`, and the PEFT folder `adapter`. Training
    goes on from the weights in the PEFT folder `start`, of the recipe's own kind; None: fresh ones.
    """

    recipe: TrainingRecipe
    base_folder: Path
    base_name: str
    base_revision: str
    data_file: Path
    work_dir: Path
    start: Path | None = None

    @property
    def adapter_folder(self) -> Path:
        """Where the trained adapter is saved."""
        return self.work_dir / "adapter"

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints are kept while training runs."""
        return self.work_dir / "checkpoints"

    @property
    def result_file(self) -> Path:
        """Where the result is written, last of all."""
        return self.work_dir / "result.json"

    def identity(self) -> str:
        """Return the hash of all that the weights depend on; no path counts."""
        with self.data_file.open("rb") as file:
            rows = hashlib.file_digest(file, "sha256").hexdigest()
        made_of = [self.recipe, self.base_name, self.base_revision, rows]
        if self.start is not None:
            made_of.append(adapter_weights_sha256(self.start))
        return content_sha256(made_of)

    def check(self) -> None:
        """Raise NotFoundError for files that are not there, InvalidSpecError for a folder in use.

        A work folder belongs to one identity: checkpoints of another would be resumed silently.
        """
        missing = [
            str(path)
            for path in (self.base_folder / "config.json", self.data_file)
            if not path.is_file()
        ]
        if missing:
            raise NotFoundError("the training job cannot start", expected="; ".join(missing))
        mark = self.work_dir / "identity"
        identity = self.identity()
        if mark.is_file() and mark.read_text() != identity:
            raise InvalidSpecError(
                f"the work folder {self.work_dir} belongs to another training run",
                expected=identity,
                found=mark.read_text(),
                do="choose another work folder, or delete this one",
            )
        self.work_dir.mkdir(parents=True, exist_ok=True)
        mark.write_text(identity)

    def write(self) -> Path:
        """Write the job into its work folder as JSON and return the file."""
        path = self.work_dir / "job.json"
        path.write_bytes(_JOB.dump_json(self, indent=2))
        return path

    @classmethod
    def read(cls, path: Path) -> "TrainingJob":
        """Read what `write` wrote. Raises InvalidSpecError."""
        try:
            return _JOB.validate_json(path.read_bytes())
        except ValidationError as error:
            raise InvalidSpecError(f"{path} is not a training job", found=error) from error


@dataclass(frozen=True)
class TrainingResult:
    """A trained adapter.

    `final_loss` is the mean over the last ten steps, in nats a token. `seconds` and `tokens_per_s`
    are those of the process that finished: a resumed run counts from where it resumed.
    `shortened_rows` counts the rows that were cut at `max_length`.
    """

    folder: Path
    weights_sha256: str
    steps: int
    final_loss: float
    seconds: float
    tokens_per_s: float
    trainable_parameters: int
    shortened_rows: int

    def write(self, path: Path) -> None:
        """Write the result as JSON, atomically."""
        atomic_write(path, _RESULT.dump_json(self, indent=2))

    @classmethod
    def read(cls, path: Path) -> "TrainingResult":
        """Read what `write` wrote."""
        return _RESULT.validate_json(path.read_bytes())


_JOB = TypeAdapter(TrainingJob)
_RESULT = TypeAdapter(TrainingResult)

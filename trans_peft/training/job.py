"""The input and the result of one training run."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from trans_peft.domain.identity import content_sha256
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.errors import InvalidSpecError, NotFoundError
from trans_peft.files import atomic_write
from trans_peft.models import adapter_weights_sha256
from trans_peft.training.dp_sgd import DpSgd

__all__ = ["TrainingJob", "TrainingResult"]


@dataclass(frozen=True)
class TrainingJob:
    """A recipe with local copies of everything that it names.

    Attributes:
        recipe: the recipe.
        base_folder: folder of the base model.
        base_name: name of the base in the saved adapter_config.json.
        base_revision: revision of the base in the saved adapter_config.json.
        data_file: training rows of the recipe's first source, as JSON Lines
            (`trans_peft.data.write_examples`).
        work_dir: folder of everything that the run writes: checkpoints, `result.json`, and the
            PEFT folder `adapter`.
        start: PEFT folder with the initial weights, of the recipe's spec; None for new weights.
        targets: a teacher's answers (`trans_peft.training.distillation.TeacherTargets`) to learn
            from instead of the answers in `data_file`, which then has the prompts.
        more_data_files: training rows of its other sources, in order. Without them, all rows are in
            `data_file`, and the weights of the sources have no effect.
        validation_file: held-out rows, if the recipe has `validation`.
        dp_sgd: parameters of a differentially private training; None trains without. A micro-step
            then has one row, and `gradient_accumulation` is the expected number of rows of a step.
    """

    recipe: TrainingRecipe
    base_folder: Path
    base_name: str
    base_revision: str
    data_file: Path
    work_dir: Path
    start: Path | None = None
    targets: Path | None = None
    more_data_files: tuple[Path, ...] = ()
    validation_file: Path | None = None
    dp_sgd: DpSgd | None = None

    @property
    def data_files(self) -> tuple[Path, ...]:
        """The files of the training rows, one for each source."""
        return (self.data_file, *self.more_data_files)

    @property
    def adapter_folder(self) -> Path:
        """PEFT folder of the trained adapter."""
        return self.work_dir / "adapter"

    @property
    def checkpoint_folder(self) -> Path:
        """Folder of the checkpoints during training."""
        return self.work_dir / "checkpoints"

    @property
    def file(self) -> Path:
        """File of the job, which its processes read."""
        return self.work_dir / "job.json"

    @property
    def result_file(self) -> Path:
        """File of the result, which is written last."""
        return self.work_dir / "result.json"

    def identity(self) -> str:
        """Return the hash of everything that the trained weights depend on. Paths do not count."""
        inputs = [self.recipe, self.base_name, self.base_revision, _sha256(self.data_file)]
        inputs += [_sha256(path) for path in self.more_data_files]
        if self.validation_file is not None:
            inputs.append(_sha256(self.validation_file))
        if self.start is not None:
            inputs.append(adapter_weights_sha256(self.start))
        if self.targets is not None:
            inputs.append(_sha256(self.targets))
        if self.dp_sgd is not None:
            inputs.append(self.dp_sgd)
        return content_sha256(inputs)

    def check(self) -> None:
        """Raise NotFoundError for missing files, InvalidSpecError for another run's work folder.

        A work folder belongs to one identity. Otherwise training would resume from checkpoints of
        another run.
        """
        missing = [
            str(path)
            for path in (
                self.base_folder / "config.json",
                *self.data_files,
                self.validation_file,
                self.targets,
            )
            if path is not None and not path.is_file()
        ]
        if missing:
            raise NotFoundError(
                "files of the training job are missing",
                expected="; ".join(missing),
                do="download the base and the data again",
            )
        self._check_files()
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

    def _check_files(self) -> None:
        problems = []
        files, sources = len(self.data_files), len(self.recipe.sources)
        if self.more_data_files and files != sources:
            problems.append(f"{files} data files for {sources} sources of the recipe")
        if (self.validation_file is None) != (self.recipe.validation is None):
            problems.append(
                "a validation file and the recipe's validation belong together, and only one of "
                "them is given"
            )
        if self.dp_sgd is not None and not self._trains_on_single_rows():
            problems.append(
                "dp_sgd needs micro-steps of one row of answers, in one process, and no targets"
            )
        if problems:
            raise InvalidSpecError(
                "the files of the training job do not fit its recipe", found="; ".join(problems)
            )

    def _trains_on_single_rows(self) -> bool:
        recipe = self.recipe
        return (
            recipe == recipe.for_answers()
            and self.targets is None
            and (recipe.processes, recipe.optimizer.batch_size) == (1, 1)
        )

    def write(self) -> Path:
        """Write the job into its work folder as JSON, atomically, and return the file.

        Other users cannot read it, because it contains the key of a private training.
        """
        atomic_write(self.file, _JOB.dump_json(self, indent=2), mode=0o600)
        return self.file

    @classmethod
    def read(cls, path: Path) -> "TrainingJob":
        """Read a file that `write` wrote. InvalidSpecError if it is not a job."""
        try:
            return _JOB.validate_json(path.read_bytes())
        except ValidationError as error:
            raise InvalidSpecError(
                f"{path} is not a training job",
                expected="a file that TrainingJob.write wrote",
                found=error,
            ) from error


@dataclass(frozen=True)
class TrainingResult:
    """A trained adapter.

    Attributes:
        folder: PEFT folder of the adapter.
        weights_sha256: hash of its weights.
        steps: optimizer steps that were made.
        final_loss: mean loss of the last ten steps, in nats per token; with the objective dpo, the
            mean loss of a pair.
        seconds: duration of training; of a resumed run, since it resumed.
        tokens_per_s: tokens per second in that time.
        trainable_parameters: number of trained parameters.
        shortened_rows: rows that were cut at `max_length`.
        epochs: how often the steps used each row.
        validation_loss: loss of the adapter on the validation rows, in nats per token; None without
            validation.
        kept_step: step whose weights the adapter has, if there is validation.
        device_seconds: duration of training in seconds times the number of processes. Each process
            uses one device. Attempts that were interrupted count up to their last checkpoint.
    """

    folder: Path
    weights_sha256: str
    steps: int
    final_loss: float
    seconds: float
    tokens_per_s: float
    trainable_parameters: int
    shortened_rows: int
    epochs: float = 0.0
    validation_loss: float | None = None
    kept_step: int | None = None
    device_seconds: float = 0.0

    @property
    def tags(self) -> dict[str, str]:
        """The figures that a registered adapter version has as tags."""
        return {
            "final_loss": f"{self.final_loss:.4f}",
            "device_seconds": f"{self.device_seconds:.1f}",
        }

    def write(self, path: Path) -> None:
        """Write the result as JSON, atomically."""
        atomic_write(path, _RESULT.dump_json(self, indent=2))

    @classmethod
    def read(cls, path: Path) -> "TrainingResult":
        """Read a file that `write` wrote."""
        return _RESULT.validate_json(path.read_bytes())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_JOB = TypeAdapter(TrainingJob)
_RESULT = TypeAdapter(TrainingResult)

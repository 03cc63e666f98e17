from dataclasses import replace

import pytest

from tests.training.conftest import EXAMPLES, recipe
from trans_peft.data import write_examples
from trans_peft.errors import InvalidSpecError, NotFoundError
from trans_peft.training.job import TrainingJob, TrainingResult


def test_a_written_job_reads_back_equal(make_job, tmp_path):
    job = make_job(tmp_path, recipe(dropout=0.1, masking_p=0.1, processes=2))
    assert TrainingJob.read(job.write()) == job


def test_a_written_result_reads_back_equal(tmp_path):
    result = TrainingResult(tmp_path, "ab", 8, 1.5, 2.0, 100.0, 64, 0)
    result.write(tmp_path / "result.json")
    assert TrainingResult.read(tmp_path / "result.json") == result


def test_a_file_that_is_not_a_job_is_refused(tmp_path):
    (tmp_path / "job.json").write_text('{"recipe": 3}')
    with pytest.raises(InvalidSpecError, match="not a training job"):
        TrainingJob.read(tmp_path / "job.json")


def test_missing_files_are_reported_before_anything_is_written(make_job, tmp_path):
    job = make_job(tmp_path / "work", recipe())
    lost = replace(job, base_folder=tmp_path, data_file=tmp_path / "none.jsonl")
    with pytest.raises(NotFoundError, match=r"config\.json; .*none\.jsonl"):
        lost.check()
    assert not (tmp_path / "work").exists()


def test_a_work_folder_belongs_to_one_training(make_job, tmp_path):
    job = make_job(tmp_path, recipe())
    job.check()
    job.check()
    other_rows = write_examples(EXAMPLES[1:], tmp_path / "other.jsonl")
    for other in (
        make_job(tmp_path, recipe(steps=9)),
        replace(job, base_revision="beef"),
        replace(job, data_file=other_rows),
    ):
        with pytest.raises(InvalidSpecError, match="belongs to another training run"):
            other.check()

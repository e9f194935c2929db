"""tests/evidence: its commands parse, and its shortcut changes no result."""

import importlib
import json
import shlex
import sys

import pytest
import torch
from helpers import ROOT, SCRIPTS, flags, main, student

sys.path.insert(0, str(ROOT / "tests" / "evidence"))

import cached_teacher
import study


def test_every_command_of_the_study_parses():
    for run in study.all_runs().values():
        script, *words = shlex.split(run.command)
        if "/" not in script:  # not beside_timm.py, which needs timm
            importlib.import_module(script.removesuffix(".py")).parse_args(words)


def test_every_line_of_results_is_whole():
    for text in study.RESULTS.read_text().splitlines():
        line = json.loads(text)
        assert {"name", "seed", "command", "commit", "cpu", "date", "versions"} <= line.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_reads_its_teachers_outputs_trains_the_same_student(
        script, teacher, tmp_path, monkeypatch):
    def words(name):
        return flags(script, teacher, tmp_path / name, "--epochs", 1)

    main(script, *words("plain"))

    for name in SCRIPTS:  # so that the functions that are replaced come back
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "load_teacher", module.load_teacher)
    cache = tmp_path / "cache"
    cached_teacher.main(cache, f"{script}.py", words("writes"))
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    cached_teacher.main(cache, f"{script}.py", words("reads"))

    assert len(written) >= 10  # steps
    assert written == {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    expected = student(tmp_path / "plain")
    for run in ("writes", "reads"):
        weights = student(tmp_path / run)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_other_images_and_another_teacher_are_not_mistaken(tmp_path):
    def double(images):
        return 2 * images

    read_or_compute = cached_teacher.cached(double, "teacher", tmp_path)
    for images in (torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3)):
        assert torch.equal(read_or_compute(images), double(images))
    assert len(list(tmp_path.iterdir())) == 2
    another = cached_teacher.cached(torch.neg, "another", tmp_path)
    assert torch.equal(another(torch.ones(2, 3)), -torch.ones(2, 3))

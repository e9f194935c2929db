"""tests/evidence: its commands parse, its shortcut changes no result, its images and pictures."""

import importlib
import json
import re
import shlex
import sys

import pytest
import torch
from helpers import ROOT, SCRIPTS, flags, main, student
from torchvision.transforms import v2

sys.path.insert(0, str(ROOT / "tests" / "evidence"))

import cached_teacher
import control_images
import curves
import demos
import study

import common
import dearkd


def test_every_command_of_the_study_parses():
    for run in study.all_runs().values():
        script, *words = shlex.split(run.command)
        if "/" not in script:  # not beside_timm.py, which needs timm
            importlib.import_module(script.removesuffix(".py")).parse_args(words)


def test_every_line_of_results_is_whole():
    for text in study.RESULTS.read_text().splitlines():
        line = json.loads(text)
        assert {"name", "seed", "command", "commit", "cpu", "date", "versions"} <= line.keys()


@pytest.mark.parametrize("file", [ROOT / "README.md", *(f"{name}.py" for name in SCRIPTS),
                                  study.RESULTS.with_name("README.md")], ids=str)
def test_every_mean_with_a_deviation_is_in_the_results(file):
    """Numbers in prose grow old when another seed is measured."""
    results = study.read_results()
    known = {"21.8 (0.7)", "23.7 (1.2)"}  # of lightlytrain.md
    for table, rows in study.TABLES.items():
        for row in rows:
            values = study.seeds_top1(results, table, row)
            if values:
                known.add(study.mean_and_deviation(values))
    found = set(re.findall(r"\d+\.\d \(\d+\.\d\)", (ROOT / file).read_text()))
    assert found <= known


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_reads_its_teachers_outputs_trains_the_same_student(
        script, teacher, tmp_path, monkeypatch):
    def words(name):
        return flags(script, teacher, tmp_path / name, "--epochs", 1, "--data-fraction", 0.3)

    main(script, *words("plain"))

    for name in SCRIPTS:  # so that the functions that are replaced come back
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "load_teacher", module.load_teacher)
    cache = tmp_path / "cache"
    cached_teacher.main(cache, f"{script}.py", words("writes"))
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    cached_teacher.main(cache, f"{script}.py", words("reads"))

    assert len(written) >= 3  # steps
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


def test_the_tables_of_demos_are_read():
    assert demos.read_table(
        "teacher out/demo/teacher/student.pth: top-1 86.8 % on the validation images\n\n"
        "teacher, with labels           k-NN top-1  95.1 %\n"
        "student, alignment + guidance  k-NN top-1  85.4 %\n"
        "student alone      top-1   5.0 %\n"
        "DF-DearKD        images: top-1 of the CNN 100.0 %, distance 0.320\n") == {
            "teacher": 95.1, "student, alignment + guidance": 85.4, "student alone": 5.0,
            "DF-DearKD: top-1 of the CNN": 100.0, "DF-DearKD: distance": 0.32}


def test_a_curve_has_a_point_for_each_seed_and_a_line_through_the_means():
    svg = curves.draw({"alone": {1000: [20.0, 30.0], 4000: [40.0]}, "ours": {2000: [60.0]}})
    x = [curves.LEFT + 20, (curves.LEFT + curves.RIGHT) / 2, curves.RIGHT - 20]  # 1, 2, 4 thousand

    def y(top1):
        return curves.BOTTOM - (curves.BOTTOM - curves.TOP) * (top1 - 20) / 40

    points = [(float(cx), float(cy)) for cx, cy in re.findall(r'cx="(.*?)" cy="(.*?)"', svg)]
    expected = [(x[0], y(20)), (x[0], y(30)), (x[2], y(40)), (x[1], y(60))]
    torch.testing.assert_close(torch.tensor(points), torch.tensor(expected), rtol=0, atol=0.06)
    assert f'points="{x[0]:.1f},{y(25):.1f} {x[2]:.1f},{y(40):.1f}"' in svg


@pytest.mark.parametrize("kind", ["shapes", "noise"])
def test_controls_are_the_images_that_the_teacher_is_surest_of(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(control_images, "CANDIDATES", 30)
    MEAN, STD = control_images.MEAN, control_images.STD
    torch.manual_seed(0)
    cnn = dearkd.make_cnn("cifar_resnet20", 10)
    common.save_checkpoint(tmp_path / "cnn.pth", model=cnn.state_dict(), cnn="cifar_resnet20")
    control_images.main(kind, str(tmp_path / "cnn.pth"), tmp_path / "made", 3)

    images = common.ImageFolder(tmp_path / "made" / "train", control_images.CLASSES)
    assert images.targets == [label for label in range(10) for _ in range(3)]
    read = torch.stack([v2.functional.pil_to_tensor(image) for image, _ in images]) / 255
    logits = cnn.eval()((read - MEAN) / STD)
    pixels = control_images.candidate_pixels(kind)
    surest = cnn((pixels - MEAN) / STD).log_softmax(1).topk(3, dim=0).indices  # (3, 10)
    stored = (255 * pixels + 0.5).byte() / 255
    expected = cnn((stored[surest.T.flatten()] - MEAN) / STD)               # (30, 10)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)

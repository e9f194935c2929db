"""README.md: its commands parse, its code runs."""

import importlib
import re
import shlex
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, make_photos

import attndistill
import dearkd
import eval_knn
import vitkd

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run():
    vitkd_code, attndistill_code, hint_code, dearkd_code = blocks("python")
    values = {
        "student_shallow": [torch.randn(2, 196, 192)] * 2, "student_deep": torch.randn(2, 196, 192),
        "teacher_shallow": [torch.randn(2, 196, 384)] * 2, "teacher_deep": torch.randn(2, 196, 384),
        "student_logits": torch.randn(2, 10), "teacher_logits": torch.randn(2, 10),
        "target": torch.tensor([1, 2]), "cross_entropy": torch.tensor(2.0)}
    exec(vitkd_code, values)  # noqa: S102 - the README is ours
    assert values["loss"].isfinite() and values["loss"] > 2
    values = {"features": torch.randn(6, 8), "labels": torch.tensor([0, 0, 0, 1, 1, 1]),
              "cross_entropy": torch.tensor(2.0)}
    exec(dearkd_code, values)  # noqa: S102
    assert values["loss"] > 2
    values |= {"student_tokens": torch.randn(2, 196, 192),
               "teacher_map": torch.rand(2, 512, 28, 28)}
    exec(hint_code, values)  # noqa: S102
    assert values["loss"] > 2
    values = {
        "student_cls": torch.randn(2, 192),
        "teacher_cls": torch.randn(2, 384), "student_attn": torch.rand(2, 3, 197).softmax(-1),
        "teacher_attn": torch.rand(2, 6, 785).softmax(-1)}
    exec(attndistill_code, values)  # noqa: S102
    assert values["loss"].isfinite() and values["loss"] > 1


def test_every_command_of_a_script_parses(monkeypatch):
    commands = [shlex.split(line, comments=True) for block in blocks("bash")
                for line in block.splitlines()]
    for script, least in ((vitkd, 6), (attndistill, 3), (dearkd, 5), (eval_knn, 1)):
        name = f"{script.__name__}.py"
        ours = [words for words in commands if name in words and "--help" not in words]
        assert len(ours) >= least
        for words in ours:
            monkeypatch.setattr("sys.argv", words[words.index(name):])
            script.parse_args()


@pytest.mark.slow
def test_the_commands_for_own_images_run_in_their_order(tmp_path):
    """As they stand but for --epochs 1 (and the names of images to draw), in a copy."""
    for path in (*ROOT.glob("*.py"), ROOT / "README.md"):
        shutil.copy(path, tmp_path)
    make_photos(tmp_path / "my" / "images")
    commands = [line for block in blocks("bash") for line in block.splitlines()
                if line.startswith("python ") and "my/images" in line]
    assert len(commands) >= 5
    for i, command in enumerate(commands):
        out = "" if "--out" in command else f" --out out/{i}"
        subprocess.run(f"{command} --epochs 1{out}", shell=True, cwd=tmp_path, check=True)


def test_what_is_to_be_read_stands_where_the_readme_points():
    places = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(places) >= 12
    for name, file, line in places:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        name = name.removesuffix(".py").split(".")[-1]
        assert re.match(rf" *(def|class) {name}\b|# -----", text), (name, file, text)


def test_every_link_to_a_file_or_heading_leads_somewhere():
    for text in (README, (ROOT / "tests" / "evidence" / "README.md").read_text()):
        for target in re.findall(r"\]\(([^)#]+?)(?:#L\d+)?\)", text):
            assert target.startswith("https://") or (ROOT / target).exists(), target
    headings = {re.sub(r"[^a-z -]", "", line.lower().lstrip("# ")).replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= headings


def test_the_tables_say_what_the_logs_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "evidence")
    study = importlib.import_module("study")
    assert study.filled_readme() == README
    assert study.result("epoch 1/2  top1 40\nepoch 2/2  ce 1  top1 41.25  top5 90  3 s") == 41.25
    assert study.result("k-NN, k = 10   top-1  29.26 %\nk-NN, k = 20   top-1  30.41 %") == 30.41


def test_the_faults_that_are_listed_have_tests():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    table = README.split("## What it survives")[1].split("##")[0]
    names = re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", table)
    assert len(names) >= 10 and all(f"def {name}" in tests for name in names)


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text().replace("python3 -m venv", "exit; #")
    shown = subprocess.run(["bash", "-c", script, str(ROOT / ".ci" / "run")], cwd=ROOT, text=True,
                           capture_output=True, check=True)
    assert shown.stdout.startswith("+ pip install -r requirements.txt && python -m pytest ")

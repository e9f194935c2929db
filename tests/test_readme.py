"""README.md: its commands parse, its code runs."""

import re
import shlex

import torch
from conftest import ROOT

import attndistill
import dearkd
import eval_knn
import vitkd

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run():
    vitkd_code, dearkd_code, attndistill_code = blocks("python")
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
    values = {
        "mse_loss": torch.nn.functional.mse_loss, "student_cls": torch.randn(2, 192),
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


def test_the_faults_that_are_listed_have_tests():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    table = README.split("## What it survives")[1].split("##")[0]
    names = re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", table)
    assert len(names) >= 10 and all(f"def {name}" in tests for name in names)


def test_ci_runs_the_readmes_test_command():
    import subprocess
    script = (ROOT / ".ci" / "run").read_text().replace("python3 -m venv", "exit; #")
    shown = subprocess.run(["bash", "-c", script, str(ROOT / ".ci" / "run")], cwd=ROOT, text=True,
                           capture_output=True, check=True)
    assert shown.stdout.startswith("+ pip install -r requirements.txt && python -m pytest ")

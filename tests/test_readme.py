"""README.md: its commands parse, its snippets run, its links lead somewhere."""

import importlib
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_a_snippet_runs_as_pasted(code):
    names = {}
    exec(code, names)  # noqa: S102 - the README is ours
    assert names["loss"].isfinite() and names["loss"] > 0


def commands():
    lines = "".join(blocks("bash")).splitlines()
    return [line for line in lines if re.search(r"\w+\.py", line)]


@pytest.mark.parametrize("line", commands())
def test_a_command_parses(line, monkeypatch):
    words = shlex.split(line.split("&&")[-1])
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.setattr("sys.argv", words[at:])
    script = importlib.import_module(words[at].removesuffix(".py"))
    script.parse_args()


def test_links_and_headings_lead_somewhere():
    for text in (README, (ROOT / "tests" / "evidence" / "README.md").read_text()):
        for target in re.findall(r"\]\(([^)#]+?)\)", text):
            assert target.startswith("https://") or (ROOT / target).exists(), target


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text().replace("python3 -m venv", "exit; #")
    shown = subprocess.run(["bash", "-c", script, str(ROOT / ".ci" / "run")], cwd=ROOT, text=True,
                           capture_output=True, check=True)
    assert shown.stdout.startswith("+ pip install -r requirements.txt && python -m pytest ")

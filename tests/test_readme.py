"""README.md: its commands parse, its snippets run, its links lead somewhere."""

import importlib
import inspect
import re
import shlex

import pytest
import torch
from helpers import ROOT

import vitkd

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


CUT, *SNIPPETS = blocks("python")


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs_as_pasted(code):
    names = {}
    exec(code, names)  # noqa: S102 - the README is ours
    assert names["loss"].isfinite() and names["loss"] > 0


def test_the_heads_rows_of_some_classes_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet_classes.txt").write_text("\n".join(f"n{i:08d}" for i in range(1000)))
    for i in (907, 13):
        (tmp_path / "my" / "images" / "train" / f"n{i:08d}").mkdir(parents=True)
    weights = vitkd.ViT(**vitkd.SIZES["deit_t"]).state_dict()
    torch.save({"model": weights}, "deit_tiny_patch16_224-a1311bcf.pth")
    exec(CUT, {})  # noqa: S102
    teacher = vitkd.load_teacher("deit_t", "teacher.pth", num_classes=2)
    assert torch.equal(teacher.head.weight, weights["head.weight"][[13, 907]])


def commands():
    lines = "".join(blocks("bash")).splitlines() + re.findall(r"`(python \w+\.py [^`]+)`", README)
    return [line for line in lines if re.search(r"\w+\.py", line)]


@pytest.mark.parametrize("line", commands())
def test_a_command_parses(line, monkeypatch):
    words = shlex.split(line.split("&&")[-1])
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.setattr("sys.argv", words[at:])
    script = importlib.import_module(words[at].removesuffix(".py"))
    if "--help" in words:
        with pytest.raises(SystemExit) as end:
            script.parse_args()
        assert end.value.code == 0
    else:
        script.parse_args()


def test_the_heading_that_an_error_names_is_there():
    heading = "An ImageNet teacher for some of its classes"
    assert f"### {heading}\n" in README
    assert heading in " ".join(inspect.getsource(vitkd.load_teacher).replace('"', "").split())


def test_links_and_headings_lead_somewhere():
    for text in (README, (ROOT / "tests" / "evidence" / "README.md").read_text()):
        for target in re.findall(r"\]\(([^)#]+?)\)", text):
            assert target.startswith("https://") or (ROOT / target).exists(), target

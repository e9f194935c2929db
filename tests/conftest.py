"""Shared by all tests: the scripts on the path, small image folders, running a script for real."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common

# Real images, where someone put them (class-per-folder JPEGs, see tests/evidence/README.md).
DATA = Path(os.environ.get("VIT_DISTILL_DATA", ROOT.parent / "shared" / "data"))

MICRO = ["--student", "micro", "--image-size", "16", "--patch-size", "4", "--workers", "2",
         "--batch-size", "16", "--rand-augment", "0", "--random-erasing", "0"]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: pytest --slow runs it"))


@pytest.fixture(autouse=True)
def single_thread_seed():
    torch.manual_seed(0)


@pytest.fixture
def photos(tmp_path):
    """An ImageNet-layout folder of real JPEG files: 3 classes, 40 + 10 images each, 20 x 24 px."""
    return make_photos(tmp_path / "photos")


def make_photos(folder, classes=("ant", "bee", "cat"), counts=(("train", 40), ("val", 10))):
    rng = np.random.default_rng(0)
    for split, count in counts:
        for c, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (20, 24, 3))
                pixels[..., c % 3] += 90  # learnable: a tint for each class
                Image.fromarray(pixels.astype(np.uint8)).save(
                    folder / split / name / f"{i:03d}.jpg")
    return folder


def in_process(script, capsys, monkeypatch, *arguments):
    """Run script.main() as the command line would; returns (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    monkeypatch.setattr(common, "SCRIPT", f"{script.__name__}.py")
    status = 0
    try:
        common.run(script.main)
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def environment():
    """For processes: two cores are shared by all that run at once, so none spins while it waits."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def start(*command, **keywords):
    """Start a script of this project as a real process; command[0] is the script, or torchrun."""
    words = list(map(str, command))
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    else:
        words = [sys.executable, *words]
    return subprocess.Popen(words, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **keywords)


def finish(process, timeout=240):
    """(exit status, stdout, stderr) of a started process."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def torchrun(processes, script, *arguments):
    """A torchrun command that picks a free port."""
    return ("torchrun", "--standalone", "--nproc_per_node", processes, script, *arguments)


def top1s(text):
    return [float(number) for number in re.findall(r"top-?1 (\d+\.?\d*)", text)]

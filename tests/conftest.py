"""Shared by all tests: the scripts on the path, small image folders, running a script for real."""

import functools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same tests everywhere: on CPUs

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import attndistill
import common
import dearkd
import vitkd

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


class Process:
    """A script of this project, or torchrun, in a process of its own, forked by warm.py. It writes
    to files: workers of one that was killed would hold pipes open for another five seconds."""

    def __init__(self, words, more):
        self.files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.pid, self.returncode = ask("start", {**environment(), **more},
                                        [file.name for file in self.files], words), None

    def poll(self):
        if self.returncode is None:
            self.returncode = ask("poll", self.pid)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


@functools.cache
def warm():
    return subprocess.Popen([sys.executable, ROOT / "tests" / "warm.py"], cwd=ROOT, text=True,
                            env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def ask(*question):
    print(json.dumps(question), file=warm().stdin, flush=True)
    return json.loads(warm().stdout.readline())


def start(*command, **more):
    """Start a script, command[0]; more: variables of its environment."""
    words = list(map(str, command))
    if words[0] == "torchrun":
        words = ["-m", "torch.distributed.run", *words[1:]]
    return Process(words, {name: str(value) for name, value in more.items()})


def start_ranks(*commands):
    """Start the commands as ranks of one job, as torchrun does."""
    more = {"WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start(*command, RANK=rank, LOCAL_RANK=rank, **more)
            for rank, command in enumerate(commands)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finish(process, timeout=240):
    """(exit status, stdout, stderr) of a started process."""
    deadline = time.monotonic() + timeout
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"still running after {timeout} s")
        time.sleep(0.005)
    return process.returncode, *(Path(file.name).read_text() for file in process.files)


def run(*command, status=0, timeout=240, processes=1):
    """(stdout, stderr) of a script, or its ranks, run to the end, which must have that status."""
    ranks = [start(*command)] if processes == 1 else start_ranks(*[command] * processes)
    codes, out, err = zip(*(finish(rank, timeout) for rank in ranks))
    out, err = "".join(out), "".join(err)
    assert set(codes) == {status}, err[-3000:] + out[-1000:]
    return out, err


def wait_for(condition, process, seconds=120):
    """Until condition() holds; the process must go on meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def children(pid):
    """Process ids of its child processes."""
    found = []
    for stat in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path("/proc", stat, "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == pid:
                found.append(int(stat))
        except OSError:
            continue
    return found


def a_teacher(script, folder):
    """A student.pth of random weights, 10 classes, 16 px: what `script` can learn from."""
    arch = {"image_size": 16, "patch_size": 4, "dim": 48, "depth": 2, "num_heads": 4,
            "num_classes": 10 if script == "vitkd" else 0}
    if script == "dearkd":
        arch = {"cnn": "cifar_resnet20", "image_size": 16, "num_classes": 10}
        model = dearkd.make_cnn("cifar_resnet20", 10)
    else:
        model = (vitkd if script == "vitkd" else attndistill).ViT(**arch)
    common.save_checkpoint(folder / "teacher.pth", model=model.state_dict(), arch=arch,
                           script=script, top1=None)
    return folder / "teacher.pth"


def command_of(script, folder, *flags):
    """A command line of a training script on shapes, with a teacher (vitkd: without)."""
    more = {"vitkd": ["--teacher", "none", "--random-erasing", 0],
            "attndistill": ["--eval-every", 1000],
            "dearkd": ["--random-erasing", 0]}[script]
    if script != "vitkd":
        more += ["--teacher", a_teacher(script, folder)]
    return [f"{script}.py", "--image-size", 16, "--patch-size", 4, "--data", "shapes", "--workers",
            2, "--data-fraction", 0.02, "--lr", "1e-3", *more, *flags]


def torchrun(processes, script, *arguments):
    """A torchrun command that picks a free port."""
    return ("torchrun", "--standalone", "--nproc_per_node", processes, script, *arguments)


def top1s(text):
    return [float(number) for number in re.findall(r"top-?1 (\d+\.?\d*)", text)]


def float64_vit(state, images, num_heads):
    """A ViT's forward pass from the released key names alone, in float64 einsums: (logits, or the
    normed class token where there is no head; its attention in the last block (B, H, 1+N))."""
    p = {k: v.double() for k, v in state.items()}
    patch_size = p["patch_embed.proj.weight"].shape[-1]

    def norm(x, name):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean)**2).mean(-1, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return torch.einsum("...i,oi->...o", x, p[f"{name}.weight"]) + p[f"{name}.bias"]

    B, _, S, _ = images.shape
    g, P = S // patch_size, patch_size
    x = images.double().reshape(B, 3, g, P, g, P)
    x = torch.einsum("bcgphq,dcpq->bghd", x, p["patch_embed.proj.weight"])
    x = x.reshape(B, g * g, -1) + p["patch_embed.proj.bias"]
    cls = p["cls_token"].expand(B, -1, -1)
    if p["pos_embed"].shape[1] == g * g:
        x = torch.cat([cls, x + p["pos_embed"]], 1)
    else:
        x = torch.cat([cls, x], 1) + p["pos_embed"]
    depth = 1 + max(int(k.split(".")[1]) for k in p if k.startswith("blocks."))
    for i in range(depth):
        b = f"blocks.{i}"
        qkv = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv")
        q, k, v = qkv.reshape(B, -1, 3, num_heads, x.shape[-1] // num_heads).unbind(2)
        attn = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        attn = attn.softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", attn, v).flatten(2)
        x = x + p.get(f"{b}.gamma_1", p.get(f"{b}.ls1.gamma", 1)) * linear(mixed, f"{b}.attn.proj")
        h = linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + p.get(f"{b}.gamma_2", p.get(f"{b}.ls2.gamma", 1)) * linear(h, f"{b}.mlp.fc2")
    cls = norm(x, "norm")[:, 0]
    return linear(cls, "head") if "head.weight" in p else cls, attn[:, :, 0]


def released_state(dim, depth, deit3, patch_size=16, grid=14, num_classes=1000):
    """Random weights under the keys and shapes of DeiT's (or DeiT III's) released files."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, grid**2 + (not deit3), dim),
              "patch_embed.proj.weight": (dim, 3, patch_size, patch_size),
              "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,),
              "head.weight": (num_classes, dim), "head.bias": (num_classes,)}
    for i in range(depth):
        for layer, out, into in (("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim),
                                 ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim)):
            shapes[f"blocks.{i}.{layer}.weight"] = (out, into)
            shapes[f"blocks.{i}.{layer}.bias"] = (out,)
        for norm in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{norm}.weight"] = shapes[f"blocks.{i}.{norm}.bias"] = (dim,)
        if deit3:
            shapes[f"blocks.{i}.gamma_1"] = shapes[f"blocks.{i}.gamma_2"] = (dim,)
    state = {name: 0.05 * torch.randn(shape) for name, shape in shapes.items()}
    for name in state:
        if "norm" in name and name.endswith("weight") or "gamma" in name:
            state[name] += 1
    return state

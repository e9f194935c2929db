"""What the tests share: places, short runs, real processes, a ViT in float64."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common
import vitkd

# Optional real images and weights, one zip file or .pth each; tests that use them skip without.
DATA = Path(os.environ.get("VIT_DISTILL_DATA", ROOT.parent / "shared" / "data"))

SCRIPTS = ["vitkd", "attndistill", "dearkd"]

# ------------------------------------------------------------------ runs

# Flags of a run that takes a second: 16 patches, a small ViT, no augmentation but crop and flip.
TINY = ("--image-size 16 --patch-size 4 --student micro --batch-size 16 --workers 0 --epochs 2 "
        "--lr 1e-3 --amp off").split()
PLAIN = "--mixup 0 --cutmix 0 --rand-augment 0 --random-erasing 0".split()


def flags(script, teacher, out, *more):
    """Return the words of a run of 160 shapes, ten steps an epoch. Later flags override earlier.

    teacher: the fixture of this name.
    """
    words = [*TINY, "--data", teacher.with_name("shapes"), "--eval-every", 100, "--out", out]
    if script != "attndistill":  # it has no such flags
        words += PLAIN
    words += ["--teacher", cnn_beside(teacher) if script == "dearkd" else teacher]
    return [str(word) for word in [*words, *more]]


def cnn_beside(teacher):
    """Return cnn.pth, a CNN of random weights as dearkd.py --train-teacher writes them.

    teacher: the fixture of this name. The file lies beside it.
    """
    path = teacher.with_name("cnn.pth")
    if not path.exists():
        import dearkd
        state = dearkd.make_cnn("cifar_resnet20", 10).state_dict()
        common.save_checkpoint(path, model=state, cnn="cifar_resnet20")
    return path


def main(script, *words):
    """Run a script in this process."""
    importlib.import_module(script).main([str(word) for word in words])


def error_of(script, *words):
    """Run a script in this process, which must end in one line. Return what it says."""
    with pytest.raises(SystemExit) as end:
        main(script, *words)
    message = str(end.value)
    assert len(message.splitlines()) == 1
    assert ": error: " in message
    return message.partition(": error: ")[2]


def records(out):
    """Return the epochs' records of a run."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def student(out):
    """Return the weights of the student that a run has saved."""
    return common.load_checkpoint(out / "student.pth")["model"]


def start(*command, **environment):
    """Start a script of this project, or torchrun, in a process of its own."""
    words = [str(word) for word in command]
    if words[0] == "torchrun":
        words[:1] = ["-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def run(*command, status=0, **environment):
    """Run a process to its end. Return (stdout, stderr)."""
    process = start(*command, **environment)
    out, err = process.communicate(timeout=1200)  # a demo on an old CPU takes minutes
    assert process.returncode == status, out + err
    return out, err


# ------------------------------------------------------------------ a ViT in float64

SMALL = {"dim": 48, "depth": 3, "num_heads": 3}  # what deit_s and vit_s are in some tests


def plain(patch_size=16, grid=14, layer_scale=False, std=0.15):
    """Return random weights with the names and shapes of a released ViT, without a head."""
    tensors = vitkd.ViT(patch_size * grid, patch_size, **SMALL, num_classes=0).state_dict()
    if layer_scale:
        for i in range(SMALL["depth"]):
            tensors[f"blocks.{i}.ls1.gamma"] = torch.ones(SMALL["dim"])
            tensors[f"blocks.{i}.ls2.gamma"] = torch.ones(SMALL["dim"])
    around_one = ("gamma", "norm.weight", "norm1.weight", "norm2.weight")
    return {name: std * torch.randn(tensor.shape) + name.endswith(around_one)
            for name, tensor in tensors.items()}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def float64_vit(state, images, num_heads, eps=1e-6, resize="size"):
    """Compute a ViT in float64 from the released names, written anew.

    Returns (class token, its attention in the last block without the registers' columns).
    resize: how its authors fit the position embedding to another grid, see below.
    """
    p = {name: tensor.double() for name, tensor in state.items()}
    P = p["patch_embed.proj.weight"].shape[-1]
    D = p["cls_token"].shape[-1]
    B = len(images)
    g = images.shape[-1] // P
    d = D // num_heads

    def norm(x, name):
        return F.layer_norm(x, (D,), p[f"{name}.weight"], p[f"{name}.bias"], eps)

    def linear(x, name):
        x = torch.einsum("...i,oi->...o", x, p[f"{name}.weight"])
        if f"{name}.bias" in p:
            x = x + p[f"{name}.bias"] * p.get(f"{name}.bias_mask", 1)
        return x

    x = F.conv2d(images.double(), p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], P)
    cls = p["cls_token"]
    if "pos_embed" in p:
        old = math.isqrt(p["pos_embed"].shape[1] - 1)
        position = p["pos_embed"][0, 1:].T.reshape(1, D, old, old)
        if old != g:
            how = {
                "size": {"size": (g, g)},
                "antialias": {"size": (g, g), "antialias": True},
                "scale": {"scale_factor": (g + 0.1) / old},  # the grid is not quite g
            }[resize]
            position = F.interpolate(position, mode="bicubic", **how)
        x = x + position
        cls = cls + p["pos_embed"][:, :1]
    registers = torch.zeros(1, 0, D, dtype=torch.float64)
    for name in ("register_tokens", "storage_tokens", "reg_token"):
        registers = p.get(name, registers)
    R = registers.shape[1]
    tokens = [cls.expand(B, -1, -1), registers.expand(B, -1, -1), x.flatten(2).transpose(1, 2)]
    x = torch.cat(tokens, 1)

    # The pair (i, i + d/2) of a patch's query or key turns as one complex number
    rotation = torch.ones(1 + R + g * g, d // 2, dtype=torch.complex128)
    if "rope_embed.periods" in p:
        for row in range(g):
            for column in range(g):
                centre = [2 * (at + 0.5) / g - 1 for at in (row, column)]
                angle = torch.cat([2 * math.pi * c / p["rope_embed.periods"] for c in centre])
                rotation[1 + R + row * g + column] = torch.exp(1j * angle)

    def rotate(x):                                                          # (B, N, H, d)
        x = torch.complex(*x.chunk(2, -1)) * rotation[:, None]
        return torch.cat([x.real, x.imag], -1)

    depth = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    for i in range(depth):
        b = f"blocks.{i}"
        qkv = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv")
        q, k, v = qkv.reshape(B, -1, 3, num_heads, d).unbind(2)
        attn = torch.einsum("bihd,bjhd->bhij", rotate(q), rotate(k)) / math.sqrt(d)
        attn = attn.softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", attn, v).flatten(2)
        x = x + p.get(f"{b}.ls1.gamma", 1) * linear(mixed, f"{b}.attn.proj")
        h = F.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1"))
        x = x + p.get(f"{b}.ls2.gamma", 1) * linear(h, f"{b}.mlp.fc2")
    row = torch.cat([attn[:, :, 0, :1], attn[:, :, 0, 1 + R:]], -1)
    return norm(x, "norm")[:, 0], row / row.sum(-1, keepdim=True)

"""Damages a valid checkpoint in `count` ways and loads each: prints how many were refused, how many
loaded (then they must be the weights that the file holds), and how much memory that took at most.

    python tests/rotten_weights.py FOLDER [count]

Anything but common.Abort ends it with a traceback; so does code that ran.
"""

import json
import random
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import attndistill
import common
import dearkd
import vitkd


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def valid(folder):
    """{path: (load, its state)}: a student of vitkd and of attndistill, a CNN of dearkd."""
    arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "num_heads": 3,
            "num_classes": 3}
    for script in (vitkd, attndistill):
        name = script.__name__
        path, plain = f"{folder}/{name}.pth", {**arch, "num_classes": 3 * (script is vitkd)}
        common.save_checkpoint(path, model=script.ViT(**plain).state_dict(), arch=plain,
                               script=name, top1=None)
    cnn = {"cnn": "cifar_resnet20", "image_size": 16, "num_classes": 3}
    common.save_checkpoint(f"{folder}/dearkd.pth", model=dearkd.make_cnn(
        "cifar_resnet20", 3).state_dict(), arch=cnn, script="dearkd", top1=None)
    loads = {"vitkd": lambda path: vitkd.load_teacher(path, None, 3, 16),
             "attndistill": lambda path: attndistill.load_teacher(path, None, 16),
             "dearkd": lambda path: dearkd.load_teacher(path, None, 3).cnn}
    return {f"{folder}/{name}.pth": load for name, load in loads.items()}


def damage(path, target, kind, r):
    data = bytearray(Path(path).read_bytes())
    if kind == "truncated":
        Path(target).write_bytes(data[:r.randrange(len(data))])
        return
    if kind == "flipped":
        for _ in range(r.choice([1, 3, 100])):
            data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        Path(target).write_bytes(data)
        return
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["model"]
    names = [name for name in state if state[name].is_floating_point()]
    a, b = r.sample(names, 2)
    if kind == "swapped":
        while state[a].shape == state[b].shape:
            a, b = r.sample(names, 2)
        state[a], state[b] = state[b], state[a]
    elif kind == "type":
        state[a] = r.choice([state[a].long(), state[a].bool(), state[a].to(torch.complex64), "text",
                             3, None, [1.0], state[a].half(), state[a].double()])
    elif kind == "nan":
        state[a].view(-1)[r.randrange(state[a].numel())] = r.choice([float("nan"), float("inf")])
    elif kind == "nested":
        place = r.choice(["model", "arch", "script", "key", "top"])
        other = r.choice([{"x": {"y": state}}, [state], None, "text", 7, {3: state[a]}])
        if place == "key":
            state[a] = {"weight": state[a]}
        elif place == "top":
            checkpoint = other
        else:
            checkpoint[place] = other
    elif kind == "arch":
        name = r.choice(list(checkpoint["arch"]))
        checkpoint["arch"][name] = r.choice([0, -1, 7, 2.5, None, "text", [3], 10**6])
    elif kind == "code":
        checkpoint[r.choice(["model", "arch", "top1", "more"])] = Malicious()
    elif kind == "absurd":  # 10^13 numbers by their header, one on the disk
        state[a] = torch.zeros(1).expand(10**7, 10**6)
    torch.save(checkpoint, target)


def main(folder, count=200):
    kinds = ["truncated", "flipped", "swapped", "type", "nan", "nested", "arch", "code", "absurd"]
    loads, result = valid(folder), {kind: [0, 0] for kind in kinds}
    for path, load in loads.items():
        load(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(count):
        r, kind = random.Random(i), kinds[i % len(kinds)]
        path, load = list(loads.items())[i // len(kinds) % len(loads)]
        damage(path, f"{folder}/damaged.pth", kind, r)
        try:
            loaded = load(f"{folder}/damaged.pth").state_dict()
        except common.Abort as error:
            assert "\n" not in str(error), error
            result[kind][0] += 1
            continue
        result[kind][1] += 1
        bytes_only = kind in ("truncated", "flipped")  # then the weights must be the valid ones
        there = torch.load(path if bytes_only else f"{folder}/damaged.pth",
                           weights_only=True)["model"]
        for name, value in loaded.items():
            assert value.isfinite().all(), (kind, name)
            if name in there:
                assert torch.allclose(value, there[name].to(value.dtype)), (kind, name)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(json.dumps({"refused, loaded": result, "grown_gib": grown}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

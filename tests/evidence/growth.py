"""How cost grows: with tokens, batch, training features of k-NN, and images in a folder.

    python tests/evidence/growth.py steps | knn | accum | folder     # prints Markdown

steps:  seconds of ViTKD's step, deit_t <- deit_s, over image size and over batch size.
knn:    seconds of knn_predict for 2,000 test images over the number of training features.
accum:  peak memory of a run of vitkd.py with --accum 1, 2 and 4, one process each.
folder: 1.28 million files, as ImageNet has: seconds to list them, memory of four workers.
"""

import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.datasets import ImageFolder

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench

import common
import eval_knn


def seconds(call, rounds=3):
    return min(bench.alternate({"": call}, rounds)[0][""])


def step(image_size, batch_size):
    return bench.bench_step("vitkd", "deit_t", "deit_s", image_size, 16, batch_size)[3]


def steps():
    args = Namespace(amp=None)
    common.precision(args, bench.DEVICE)  # prints the machine and sets args.amp
    bench.DTYPES["ours"] = torch.bfloat16 if args.amp == "bf16" else torch.float
    print("| image size (tokens), batch 8 | seconds of a step |\n|---|---|")
    for size in (112, 224, 448):
        print(f"| {size} ({(size // 16)**2}) | {seconds(step(size, 8)):.3f} |", flush=True)
    print("\n| batch, 224 px | seconds of a step |\n|---|---|")
    for batch in (4, 8, 16, 32):
        print(f"| {batch} | {seconds(step(224, batch)):.3f} |", flush=True)


def knn():
    test = F.normalize(torch.randn(2000, 384), dim=1)
    print("| training features | seconds |\n|---|---|")
    for N in (12_500, 25_000, 50_000, 100_000, 200_000):
        train, labels = torch.randn(N, 384).half(), torch.randint(0, 1000, (N,))
        call = lambda: eval_knn.knn_predict(train, labels, test, num_classes=1000)  # noqa: B023
        print(f"| {N} | {seconds(call):.2f} |", flush=True)


def accum():
    print("| --accum | peak_memory_gb | without what --accum 64 needs |\n|---|---|---|")
    peaks = {}
    for count in (64, 1, 2, 4):
        with tempfile.TemporaryDirectory() as out:
            subprocess.run([sys.executable, "vitkd.py", "--data", "shapes", "--data-fraction",
                            "0.064", "--teacher", "none", "--student", "deit_t", "--batch-size",
                            "64", "--epochs", "2", "--workers", "0", "--accum", str(count),
                            "--out", out], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            log = (Path(out) / "log.jsonl").read_text()
        peaks[count] = float(log.rpartition('"peak_memory_gb": ')[2].split(",")[0].rstrip("}\n"))
        if count != 64:
            print(f"| {count} | {peaks[count]:.2f} | {peaks[count] - peaks[64]:.2f} |", flush=True)


def proportional_memory(process):
    """Return the MiB of a process, pages shared by n processes counted as 1/n."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def folder(classes=1000, each=1281):
    with tempfile.TemporaryDirectory() as root:
        started = time.time()
        for c in range(classes):
            (Path(root) / f"{c:04d}").mkdir()
            first = Path(root) / f"{c:04d}" / "n01440764_0000.JPEG"
            first.touch()
            for i in range(1, each):  # hard links, which are quick to make
                first.with_stem(f"n01440764_{i:04d}").hardlink_to(first)
        print(f"{classes * each} files made in {time.time() - started:.0f} s", flush=True)
        before, started = proportional_memory("self"), time.time()
        base = ImageFolder(root, loader=len)  # gives a number, reads no file
        print(f"ImageFolder: {time.time() - started:.1f} s, "
              f"{proportional_memory('self') - before:.0f} MiB", flush=True)
        images = common.Images(base, range(len(base)), lambda image: torch.zeros(1))
        args = Namespace(batch_size=256, accum=1, seed=0, workers=4)
        loader = common.make_loader(images, args, train=True)
        batches = iter(loader)
        for done in range(len(loader) + 1):
            if done in (1, len(loader) // 4, len(loader)):
                workers = [proportional_memory(w.pid) for w in batches._workers]
                print(f"after {done} of {len(loader)} batches: {sum(workers):.0f} MiB in the "
                      f"workers, {proportional_memory('self'):.0f} in the process", flush=True)
            next(batches, None)


if __name__ == "__main__":
    {"steps": steps, "knn": knn, "accum": accum, "folder": folder}[sys.argv[1]]()

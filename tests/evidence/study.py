"""Results on real images: make the runs, and the tables of both READMEs from their logs.

    python tests/evidence/study.py run [PART OF A NAME]     # what has no log yet, two at a time
    python tests/evidence/study.py tables                   # from the logs alone

Needs data/cifar10 and data/tiny_imagenet20 (train/CLASS, val/CLASS), data/cifar_resnet56.pth,
data/deit_tiny_imagenet.pth, data/deit_tiny_20.pth (the same with a head of 20 classes: see the top
README) and the images out/study/made* of dearkd_data_free.log. Each run has one core.
"""

import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
LOGS = Path(__file__).with_name("study")
OUT = "out/study"
SEEDS = (0, 1, 2)

# ------------------------------------------------------------------ commands

LIGHT = "--crop-scale 0.4 --mixup 0 --cutmix 0 --rand-augment 0 --random-erasing 0"
SHORT = "--student micro --batch-size 128 --lr 1e-3 --workers 1 --eval-every 100"
CIFAR = "--data data/cifar10 --image-size 32"
PART = f"{CIFAR} --data-fraction 0.2"  # 10,000 images
TINY = "--data data/tiny_imagenet20 --image-size 64"
LARGE = "--data data/tiny_imagenet20 --image-size 224 --patch-size 16"
ATTN, VITKD = f"attndistill.py {SHORT}", f"vitkd.py {SHORT} {LIGHT}"
DEARKD = f"dearkd.py {SHORT} {LIGHT} --patch-size 4 --epochs 6 --stage1-epochs 5 {PART}"
TINY_DEARKD = f"dearkd.py {SHORT} {LIGHT} --patch-size 8 --epochs 6 --stage1-epochs 5 {TINY}"
MADE = (f"dearkd.py {SHORT} {LIGHT} --patch-size 4 --image-size 32 --epochs 31 --stage1-epochs 26 "
        "--val data/cifar10/val")
CNN = "--teacher cifar_resnet56 --teacher-weights data/cifar_resnet56.pth"
TINY_CNN = f"--teacher {OUT}/tiny-cnn/student.pth"
VIT, TINY_VIT = f"--teacher {OUT}/cifar-vit/student.pth", f"--teacher {OUT}/tiny-vit/student.pth"
IMAGENET = "--teacher deit_t --teacher-weights data/deit_tiny_20.pth"
IMAGENET_ATTN = "--teacher vit_t16 --teacher-weights data/deit_tiny_imagenet.pth"

FEW = (f"{SHORT} {LIGHT} --data data/cifar10 --data-fraction 0.1 --patch-size 8 --epochs 8 "
       "--teacher none")

# Trained first, since the students need them
TEACHERS = {
    "cifar-vit": f"vitkd.py {CIFAR} {LIGHT} --teacher none --student deit_t --patch-size 8 "
                 "--batch-size 128 --lr 8e-4 --epochs 6 --workers 1",
    "tiny-vit": f"vitkd.py {TINY} {LIGHT} --teacher none --student deit_t --patch-size 16 "
                "--batch-size 128 --lr 8e-4 --epochs 12 --workers 1",
    "tiny-cnn": f"dearkd.py {TINY} {LIGHT} --train-teacher resnet18 --batch-size 128 --lr 2e-3 "
                "--epochs 10 --workers 1"}

# {table: {row: command without --seed and --out}}. SEED stands for the run's seed
TABLES = {
    "vitkd": {
        "alone": f"{VITKD} {PART} --patch-size 8 --epochs 8 --teacher none",
        "NKD": f"{VITKD} {PART} --patch-size 8 --epochs 8 {VIT} --alpha 0 --beta 0",
        "ViTKD": f"{VITKD} {PART} --patch-size 8 --epochs 8 {VIT} --no-nkd",
        "ViTKD + NKD": f"{VITKD} {PART} --patch-size 8 --epochs 8 {VIT}"},
    "attndistill": {
        "projector alignment": f"{ATTN} {PART} --patch-size 8 --epochs 8 {VIT} --lambda-a 0",
        "+ attention guidance": f"{ATTN} {PART} --patch-size 8 --epochs 8 {VIT}"},
    "attndistill-tiny": {
        "projector alignment": f"{ATTN} {TINY} --patch-size 16 --epochs 8 {TINY_VIT} --lambda-a 0",
        "+ attention guidance": f"{ATTN} {TINY} --patch-size 16 --epochs 8 {TINY_VIT}"},
    "dearkd": {
        "alone": f"{DEARKD} --teacher none --mhca-blocks 0",
        "the CNN's class": f"{DEARKD} {CNN} --hints none --mhca-blocks 0",
        "+ early hints": f"{DEARKD} {CNN} --mhca-blocks 0",
        "+ MHCA: DearKD": f"{DEARKD} {CNN}",
        "later hints instead": f"{DEARKD} {CNN} --hints 1:2,3:3 --mhca-blocks 0",
        "later hints + MHCA": f"{DEARKD} {CNN} --hints 1:2,3:3"},
    "dearkd-tiny": {
        "alone": f"{TINY_DEARKD} --teacher none --mhca-blocks 0",
        "the CNN's class": f"{TINY_DEARKD} {TINY_CNN} --hints none --mhca-blocks 0",
        "+ early hints": f"{TINY_DEARKD} {TINY_CNN} --mhca-blocks 0",
        "+ MHCA: DearKD": f"{TINY_DEARKD} {TINY_CNN}",
        "later hints instead": f"{TINY_DEARKD} {TINY_CNN} --hints 1:2,3:3 --mhca-blocks 0",
        "later hints + MHCA": f"{TINY_DEARKD} {TINY_CNN} --hints 1:2,3:3"},
    "data-free": {
        "DeepInversion": f"{MADE} {CNN} --data {OUT}/made0",
        "DF-DearKD": f"{MADE} {CNN} --data {OUT}/made1",
        "2,000 real images": f"{MADE} {CNN} --data data/cifar10 --data-fraction 0.04"},
    "imagenet-attndistill": {
        "projector alignment": f"{ATTN} {LARGE} {IMAGENET_ATTN} --epochs 6 --lambda-a 0",
        "+ attention guidance": f"{ATTN} {LARGE} {IMAGENET_ATTN} --epochs 6"},
    "imagenet-vitkd": {
        "alone": f"{VITKD} {LARGE} --epochs 6 --teacher none",
        "ViTKD + NKD": f"{VITKD} {LARGE} --epochs 6 {IMAGENET}"},
    "downstream": {
        "AttnDistill on CIFAR-10, then 10 % of its labels":
            f"vitkd.py {FEW} --image-size 32 --init {OUT}/attndistill-1-SEED/student.pth",
        "10 % of CIFAR-10's labels alone": f"vitkd.py {FEW} --image-size 32",
        "DearKD on Tiny-ImageNet-20, then 10 % of CIFAR-10":
            f"dearkd.py {FEW} --image-size 64 --init {OUT}/dearkd-tiny-3-SEED/student.pth",
        "10 % of CIFAR-10 alone, at 64 px": f"dearkd.py {FEW} --image-size 64"}}

# Rows of README's table: {text: (table, row without the method, row with it)}
SUMMARY = {
    "ViTKD + NKD, CIFAR-10": ("vitkd", 0, 3),
    "ViTKD + NKD, Tiny-ImageNet-20, 224 px, ImageNet DeiT-T": ("imagenet-vitkd", 0, 1),
    "DearKD, CIFAR-10": ("dearkd", 0, 3),
    "DearKD, Tiny-ImageNet-20": ("dearkd-tiny", 0, 3),
    "DF-DearKD, CIFAR-10, no real image": ("data-free", 0, 1),
    "AttnDistill, CIFAR-10, k-NN": ("attndistill", 0, 1),
    "AttnDistill, Tiny-ImageNet-20, k-NN": ("attndistill-tiny", 0, 1),
    "AttnDistill, Tiny-ImageNet-20, 224 px, ImageNet DeiT-T, k-NN": ("imagenet-attndistill", 0, 1),
    "fine-tuned on 10 % of CIFAR-10, after AttnDistill on CIFAR-10": ("downstream", 1, 0),
    "fine-tuned on 10 % of CIFAR-10, after DearKD on Tiny-ImageNet-20": ("downstream", 3, 2)}

# ------------------------------------------------------------------ runs


def run(name, command):
    """Run a script on one core and write what it prints to a log, unless there is one."""
    log = LOGS / f"{name}.log"
    if log.exists():
        return
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    done = subprocess.run([sys.executable, *shlex.split(command), "--out", f"{OUT}/{name}"],
                          cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log.with_suffix(".err" if done.returncode else ".log").write_text(
        f"# {time.strftime('%Y-%m-%d')}, one core of an {cpu}, torch {torch.__version__}\n"
        f"$ python {command}\n{done.stdout}")
    print(name, done.stdout.splitlines()[-1:], flush=True)


def run_all(part):
    teachers = {name: f"{command} --seed 0" for name, command in TEACHERS.items()}
    students = {f"{table}-{i}-{seed}": f"{row.replace('SEED', str(seed))} --seed {seed}"
                for table, rows in TABLES.items() for seed in SEEDS
                for i, row in enumerate(rows.values())}
    for jobs in (teachers, {k: v for k, v in students.items() if part in k}):
        with ThreadPoolExecutor(2) as pool:  # "downstream" is last: it needs other tables' students
            for job in jobs.items():
                pool.submit(run, *job)


# ------------------------------------------------------------------ tables


def results(name, i):
    """Return the last top-1 in percent of each seed's log: the classifier's, or k-NN's (k = 20)."""
    logs = [LOGS / f"{name}-{i}-{seed}.log" for seed in SEEDS]
    return [float(re.findall(r"  (?:top1|knn20) ([\d.]+)", log.read_text())[-1])
            for log in logs if log.exists()]


def mean_and_deviation(top1):
    deviation = f"{statistics.stdev(top1):.1f}" if len(top1) > 1 else "one seed"
    return f"{statistics.mean(top1):.1f} ({deviation})" if top1 else "not run"


def table(name):
    """Return a table in Markdown, from its logs."""
    if name == "summary":
        lines = ["| method, images | without | with |", "|---|---|---|"]
        for text, (source, *rows) in SUMMARY.items():
            cells = [mean_and_deviation(results(source, i)) for i in rows]
            lines.append(f"| {text} | {' | '.join(cells)} |")
        return "\n".join(lines)
    lines = ["| student | seeds 0, 1, 2 | mean (deviation) |", "|---|---|---|"]
    for i, row in enumerate(TABLES[name]):
        top1 = results(name, i)
        lines.append(f"| {row} | {', '.join(f'{x:.1f}' for x in top1)} | "
                     f"{mean_and_deviation(top1)} |")
    return "\n".join(lines)


def gain(name):
    """Return the mean top-1 without and with a method, for README's table of methods."""
    for source, *rows in SUMMARY.values():
        if source == name:
            return " -> ".join(mean_and_deviation(results(name, i)) for i in rows)


def fill(path):
    """Fill <!-- study NAME --> ... <!-- end --> and <!-- gain NAME -->...<!-- end --> in a file."""
    text = re.sub(r"(<!-- study (\S+) -->\n).*?(<!-- end -->)",
                  lambda match: f"{match[1]}{table(match[2])}\n{match[3]}", path.read_text(),
                  flags=re.DOTALL)
    path.write_text(re.sub(r"(<!-- gain (\S+) -->).*?(<!-- end -->)",
                           lambda match: match[1] + gain(match[2]) + match[3], text))


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run_all(sys.argv[2] if sys.argv[2:] else "")
    elif sys.argv[1:] == ["tables"]:
        fill(ROOT / "README.md")
        fill(LOGS.with_name("README.md"))
    else:
        sys.exit(__doc__)

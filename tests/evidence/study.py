"""Results on real images, with seeds: makes the runs, and README's tables from their logs.

    python tests/evidence/study.py run [PART OF A NAME]   # what study/NAME.log lacks, two at a time
    python tests/evidence/study.py tables                 # into README, from the logs alone

Needs data/cifar10 and data/tiny_imagenet20 (class folders of JPEGs) and data/cifar_resnet56.pth.
Each run has one thread, so its log gives the seconds of one core that it took.
"""

import datetime
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOGS = Path(__file__).with_name("study")
SEEDS = (0, 1, 2)

LIGHT = "--crop-scale 0.4 --mixup 0 --cutmix 0 --rand-augment 0 --random-erasing 0"
CIFAR = "--data data/cifar10 --image-size 32"
TINY = "--data data/tiny_imagenet20 --image-size 64"
SHORT = "--student micro --batch-size 128 --lr 1e-3 --workers 1"
PART = f"{CIFAR} --data-fraction 0.2 {SHORT}"  # 10,000 images, for students
VITKD = f"vitkd.py {PART} --patch-size 8 --epochs 8 --eval-every 8 {LIGHT}"
ATTN = f"attndistill.py {PART} --patch-size 8 --epochs 8 --eval-every 8"
TINY_ATTN = f"attndistill.py {TINY} {SHORT} --patch-size 16 --epochs 8 --eval-every 8"
DEARKD = f"dearkd.py {PART} --patch-size 4 --epochs 6 --eval-every 6 {LIGHT}"
TINY_DEARKD = f"dearkd.py {TINY} {SHORT} --patch-size 8 --epochs 6 --eval-every 6 {LIGHT}"
STAGES = "--stage1-epochs 5"
VIT, TINY_VIT = "out/study/cifar10-vit/student.pth", "out/study/tiny-vit/student.pth"
CNN = f"{STAGES} --teacher cifar_resnet56 --teacher-weights data/cifar_resnet56.pth"
TINY_CNN = f"{STAGES} --teacher out/study/tiny-cnn/student.pth"
SCALED = "--alpha 7.35e-4 --beta 7.35e-5"  # per element as 3e-5 and 3e-6 at 196 x 384

TEACHERS = {
    "cifar10-vit": f"vitkd.py {CIFAR} --teacher none --student deit_t --patch-size 8 --batch-size "
                   f"128 --lr 8e-4 --epochs 6 --workers 1 {LIGHT} --seed 0",
    "tiny-vit": f"vitkd.py {TINY} --teacher none --student deit_t --patch-size 16 --batch-size 128 "
                f"--lr 8e-4 --epochs 12 --eval-every 6 --workers 1 {LIGHT} --seed 0",
    "tiny-cnn": f"dearkd.py {TINY} --train-teacher resnet18 --batch-size 128 --lr 2e-3 --epochs 10 "
                f"--eval-every 5 --workers 1 {LIGHT} --seed 0",
    **{f"tiny-alone-{seed}": f"vitkd.py {TINY} {SHORT} --patch-size 16 --epochs 8 --eval-every 8 "
                             f"{LIGHT} --teacher none --seed {seed}" for seed in SEEDS}}

# {table: {row: command without --seed and --out}}
TABLES = {
    "vitkd": {
        "alone": f"{VITKD} --teacher none",
        "+ NKD": f"{VITKD} --teacher {VIT} --alpha 0 --beta 0",
        "+ ViTKD": f"{VITKD} --teacher {VIT} {SCALED} --no-nkd",
        "+ ViTKD + NKD": f"{VITKD} --teacher {VIT} {SCALED}",
        "the same, weights not scaled to 16 tokens": f"{VITKD} --teacher {VIT}"},
    "dearkd": {
        "alone": f"{DEARKD} --teacher none --mhca-blocks 0",
        "+ the CNN's class": f"{DEARKD} {CNN} --hints none --mhca-blocks 0",
        "+ hints": f"{DEARKD} {CNN} --mhca-blocks 0",
        "+ MHCA: DearKD": f"{DEARKD} {CNN}"},
    "attndistill": {
        "trained with labels, alone": "eval_knn.py --data data/cifar10 --data-fraction 0.2 "
                                      "--workers 1 --weights out/study/vitkd-0-SEED/student.pth",
        "projector alignment": f"{ATTN} --teacher {VIT} --lambda-a 0",
        "+ attention guidance: AttnDistill": f"{ATTN} --teacher {VIT}",
        "the same, guidance ten times as strong": f"{ATTN} --teacher {VIT} --lambda-a 1"},
    "dearkd-tiny": {
        "alone": f"{TINY_DEARKD} --teacher none --mhca-blocks 0",
        "+ the CNN's class": f"{TINY_DEARKD} {TINY_CNN} --hints none --mhca-blocks 0",
        "+ hints + MHCA: DearKD": f"{TINY_DEARKD} {TINY_CNN}",
        "the same without MHCA": f"{TINY_DEARKD} {TINY_CNN} --mhca-blocks 0"},
    "attndistill-tiny": {
        "projector alignment": f"{TINY_ATTN} --teacher {TINY_VIT} --lambda-a 0",
        "+ attention guidance: AttnDistill": f"{TINY_ATTN} --teacher {TINY_VIT}",
        "for comparison: trained with labels, alone":
            "eval_knn.py --data data/tiny_imagenet20 --workers 1 --weights "
            "out/study/tiny-alone-SEED/student.pth"}}

SUMMARIES = {"vitkd": (0, 3), "dearkd": (0, 3), "attndistill": (1, 2)}  # without and with, as rows


def runs():
    """{name: command}."""
    found = {}
    for table, rows in TABLES.items():
        for name, command in TEACHERS.items():
            if any(f"out/study/{name}/" in row.replace("SEED", name[-1])
                   for row in rows.values()):
                found[name] = f"{command} --out out/study/{name}"
        for seed in SEEDS:
            for i, command in enumerate(rows.values()):
                name = f"{table}-{i}-{seed}"
                found[name] = command.replace("SEED", str(seed)) if "eval_knn" in command else (
                    f"{command} --seed {seed} --out out/study/{name}")
    return found


def run(part):
    todo = {name: command for name, command in runs().items()
            if part in name and not (LOGS / f"{name}.log").exists()}
    taking = threading.Lock()

    def lane():
        while True:
            with taking:
                name = next((name for name, command in todo.items()
                             if all((LOGS / f"{needed}.log").exists()
                                    for needed in re.findall(r"out/study/(\S+)/", command))), None)
                command = todo.pop(name, None)
            if not command:
                if not todo:
                    return
                time.sleep(5)  # what is left needs a teacher that the other lane trains
                continue
            before = datetime.datetime.now()
            process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, text=True,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"},
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            lines = [line for line in output.splitlines() if "Warning" not in line]
            text = "\n".join([f"# {before:%Y-%m-%d}, {hardware()}", f"$ python {command}", *lines,
                              f"# {usage.ru_utime + usage.ru_stime:.0f} s of one core"])
            (LOGS / f"{name}.{'err' if status else 'log'}").write_text(text + "\n")
            if status:
                todo.clear()
            print(name, "FAILED" if status else "", lines[-1:], flush=True)

    lanes = [threading.Thread(target=lane) for _ in range(2)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join()


def hardware():
    import torch
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"one core of {cpu[1] if cpu else 'a CPU'}, torch {torch.__version__}, bf16"


def result(text):
    """Top-1 in percent of the last evaluation in a log: the classifier's, or k-NN's with k = 20."""
    found = re.findall(r"  top1 ([\d.]+)|knn20 ([\d.]+)|k = 20 +top-1 +([\d.]+)", text)
    return float("".join(found[-1]))


def summary(name):
    """Mean of the row without the method and of that with all of it."""
    found = [[result(path.read_text()) for seed in SEEDS
              if (path := LOGS / f"{name}-{i}-{seed}.log").exists()]
             for i in SUMMARIES[name]]
    if any(len(top1s) < len(SEEDS) for top1s in found):
        return "not run"
    return f"{' -> '.join(f'{statistics.mean(top1s):.1f}' for top1s in found)} (mean of 3 seeds)"


def table(name):
    """Markdown of one table, from its logs alone."""
    head = "| student | " + " | ".join(f"seed {seed}" for seed in SEEDS)
    lines = [f"{head} | mean | deviation | core minutes |", "|---" * (len(SEEDS) + 4) + "|"]
    teachers, logs = {}, []
    for i, row in enumerate(TABLES[name]):
        texts = {seed: path.read_text() for seed in SEEDS
                 if (path := LOGS / f"{name}-{i}-{seed}.log").exists()}
        found = {seed: result(text) for seed, text in texts.items()}
        minutes = [int(re.search(r"# (\d+) s of one core", text)[1]) / 60
                   for text in texts.values()]
        cells = [f"{found[seed]:.1f}" if seed in found else "not run" for seed in SEEDS]
        few = len(found) < 2
        cells += [f"{statistics.mean(found.values()):.1f}" if found else "",
                  "" if few else f"{statistics.stdev(found.values()):.1f}",
                  f"{statistics.mean(minutes):.1f}" if minutes else ""]
        lines.append(f"| {row} | {' | '.join(cells)} |")
        logs += texts.values()
        for text in texts.values():
            for teacher, top1 in re.findall(r"teacher (\S+): top-1 ([\d.]+) %", text):
                teachers[teacher] = f"top-1 {float(top1):.1f} %"
            for teacher, top1 in re.findall(r"teacher (\S+), k-NN.* ([\d.]+) % \(knn20\)", text):
                teachers[teacher] = f"k-NN top-1 {float(top1):.1f} %"
    made = sorted({text.splitlines()[0].removeprefix("# ") for text in logs})
    return "\n".join([*lines, "", *(f"Teacher {t}: {top1}." for t, top1 in teachers.items()),
                      f"Made on {'; '.join(made)}."])


def filled_readme():
    """README with <!-- KIND NAME --> ... <!-- end --> filled with what the logs say."""
    bench = re.findall(r"(?:^\|.*\n)+", (LOGS.parent / "bench_cpu.md").read_text(), re.MULTILINE)
    kinds = {"of": summary, "study": lambda name: f"\n{table(name)}\n",
             "bench": lambda number: f"\n{bench[int(number)]}"}
    return re.sub(r"(<!-- (of|study|bench) (\S+) -->).*?(<!-- end -->)",
                  lambda match: match[1] + kinds[match[2]](match[3]) + match[4],
                  (ROOT / "README.md").read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2] if len(sys.argv) > 2 else "")
    elif sys.argv[1:] == ["tables"]:
        (ROOT / "README.md").write_text(filled_readme())
    else:
        sys.exit(__doc__)

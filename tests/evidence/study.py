"""Make the runs on real images, and fill the tables of both READMEs.

    python tests/evidence/study.py run [PART [CACHE]]   # what has no line in results.jsonl yet
    python tests/evidence/study.py tables               # from results.jsonl alone

PART: only runs whose name contains it. CACHE: a folder in which runs keep what their teachers say,
for the next runs with the same images (cached_teacher.py).

A run is one row of a table below with one seed. Its name is TABLE/ROW, as "vitkd/ViTKD + NKD". A
finished run is one line of results.jsonl and a folder out/study/TABLE-ROW NUMBER-SEED. A failed run
leaves what it printed in out/study/TABLE-ROW NUMBER-SEED.err. Two runs go at a time, each on one
core. To measure a run again, delete its line.

To add a row, append it to its table in TABLES. Append it at the end: folders carry the row's
number, counted from 0. For a new table, put `<!-- study NAME -->` and `<!-- end -->` into a README.

Data: data/cifar10 and data/tiny_imagenet20, folders with train/CLASS and val/CLASS.
Teachers:
  - out/study/*/student.pth: this script trains them, see TEACHERS. A run that needs one that is not
    on this machine trains it first;
  - data/cifar_resnet56.pth: a ResNet-56 for CIFAR-10, 83.2 % top-1 on data/cifar10/val;
  - data/deit_tiny_imagenet.pth: DeiT-T/16 in the format that its authors released;
  - data/deit_tiny_20.pth: the same with the 20 rows of its head for Tiny-ImageNet-20's classes. The
    top README shows the code, under "An ImageNet teacher for some of its classes".
Made images: results.jsonl has their commands, in lines "images/...". They are
  - out/study/made-300-0 and made-300-1: DeepInversion and DF-DearKD, from out/study/cifar-cnn;
  - out/study/made-500-0: 500 images of DeepInversion, from the same;
  - out/study/made-half-1: 1,000 of DF-DearKD, the first 100 of 300 steps at half size;
  - out/study/shapes and noise: controls without inversion;
  - out/study/made0 and made1: DeepInversion and DF-DearKD, from data/cifar_resnet56.pth.
"""

import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import best_precision

RESULTS = Path(__file__).with_name("results.jsonl")
OUT = "out/study"
SEEDS = (0, 1, 2)

# ------------------------------------------------------------------ commands

# Crops and flips alone: runs this short gain nothing from stronger augmentation
LIGHT = "--crop-scale 0.4 --mixup 0 --cutmix 0 --rand-augment 0 --random-erasing 0"
SHORT = "--student micro --batch-size 128 --lr 1e-3 --workers 1 --eval-every 100"

CIFAR = "--data data/cifar10 --image-size 32"
CIFAR_FIFTH = f"{CIFAR} --data-fraction 0.2"  # 10,000 images
CIFAR_LARGE = "--data data/cifar10 --image-size 112 --patch-size 16"
TINY = "--data data/tiny_imagenet20 --image-size 64"
TINY_LARGE = "--data data/tiny_imagenet20 --image-size 224 --patch-size 16"

CIFAR_VIT = f"--teacher {OUT}/cifar-vit/student.pth"
TINY_VIT = f"--teacher {OUT}/tiny-vit/student.pth"
TINY_CNN = f"--teacher {OUT}/tiny-cnn/student.pth"
CIFAR_DEIT = f"--teacher {OUT}/cifar-deit/student.pth"
CIFAR_CNN = "--teacher cifar_resnet56 --teacher-weights data/cifar_resnet56.pth"
IMAGENET_VIT = "--teacher vit_t16 --teacher-weights data/deit_tiny_imagenet.pth"
IMAGENET_VIT_20 = "--teacher deit_t --teacher-weights data/deit_tiny_20.pth"

VITKD = f"vitkd.py {SHORT} {LIGHT}"
ATTN = f"attndistill.py {SHORT}"
# All 50,000 images. Half the usual batch gives twice the steps.
ALL = "--student micro --batch-size 64 --lr 1e-3 --epochs 3 --workers 1 --eval-every 100"
WEAK = "--crop-scale 0.5 --mixup 0 --cutmix 0 --rand-augment 0 --random-erasing 0"
ALL_VITKD = f"vitkd.py {CIFAR_LARGE} {WEAK} {ALL}"
# 600 steps of 32 images, and 780 steps of 64
ONE_PERCENT = (f"vitkd.py {CIFAR_LARGE} {WEAK} --teacher none --student micro --data-fraction 0.01 "
               "--batch-size 32 --epochs 40 --lr 1e-3 --workers 1 --eval-every 100")
TEN_PERCENT = (f"vitkd.py {CIFAR_LARGE} {WEAK} --teacher none --student micro --data-fraction 0.1 "
               "--batch-size 64 --epochs 10 --lr 1e-3 --workers 1 --eval-every 100")
CIFAR_CNN_JPEG = f"--teacher {OUT}/cifar-cnn/student.pth"
CURVE = (f"dearkd.py {CIFAR} --patch-size 4 {LIGHT} --student micro --batch-size 64 --lr 1e-3 "
         "--epochs 4 --stage1-epochs 3 --workers 1 --eval-every 100")
ALONE = "--teacher none --mhca-blocks 0"
HALF = f"{CURVE} --data-fraction 0.5"
ALIGNED = f"{OUT}/cifar-attndistill-0-SEED/student.pth"
GUIDED = f"{OUT}/cifar-attndistill-1-SEED/student.pth"
PROBE = "eval_knn.py --data data/cifar10 --linear --workers 1"
BESIDE_TIMM = "tests/evidence/beside_timm.py"  # its defaults are those of ALL_VITKD
ALL_ATTN = f"attndistill.py {CIFAR_LARGE} --crop-scale 0.5 {ALL}"
STAGES = "--epochs 6 --stage1-epochs 5"
DEARKD = f"dearkd.py {SHORT} {LIGHT} --patch-size 4 {STAGES} {CIFAR_FIFTH}"
TINY_DEARKD = f"dearkd.py {SHORT} {LIGHT} --patch-size 8 {STAGES} {TINY}"
# 31 epochs of 2,000 images have as many steps as 6 epochs of 10,000
DATA_FREE = (f"dearkd.py {SHORT} {LIGHT} --patch-size 4 --image-size 32 --epochs 31 "
             f"--stage1-epochs 26 --val data/cifar10/val {CIFAR_CNN}")
# 30 epochs of 2,000 images are 930 steps of 64
MADE_IMAGES = (f"{LIGHT} --image-size 32 --batch-size 64 --lr 1e-3 --workers 1 --eval-every 1000 "
               "--val data/cifar10/val")
MADE = f"dearkd.py {MADE_IMAGES} --student micro --patch-size 4 {CIFAR_CNN_JPEG}"
# Both heads learn the CNN's distribution to the end, and labels nothing
SOFT = "--soft 4 --alpha 1"
ALL_500 = f"{MADE} {SOFT} --epochs 120 --stage1-epochs 120"  # of a folder of 500 images
SOFT_500 = f"{ALL_500} --data-fraction 0.25"
ALL_1000 = f"{MADE} {SOFT} --epochs 60 --stage1-epochs 60"
SOFT_1000 = f"{ALL_1000} --data-fraction 0.5"
SOFT_2000 = f"{MADE} {SOFT} --epochs 30 --stage1-epochs 30"
DEEP_INVERSION = f"--data {OUT}/made-300-0"
DF_DEARKD = f"--data {OUT}/made-300-1"
FINE_TUNE = (f"{SHORT} {LIGHT} --data data/cifar10 --data-fraction 0.1 --patch-size 8 --epochs 8 "
             "--teacher none")
TINY_32 = (f"dearkd.py --data data/tiny_imagenet20 --image-size 32 --patch-size 4 {LIGHT} "
           "--teacher none --student micro --batch-size 64 --lr 1e-3 --epochs 4 --workers 1 "
           "--eval-every 100")

# {folder: (seed, command)}
TEACHERS = {
    "cifar-vit": (0, f"vitkd.py {CIFAR} {LIGHT} --teacher none --student deit_t --patch-size 8 "
                     "--batch-size 128 --lr 8e-4 --epochs 6 --workers 1"),
    "cifar-deit": (0, f"vitkd.py --data data/cifar10 --image-size 112 {WEAK} --teacher none "
                      "--student deit_t --init data/deit_tiny_imagenet.pth --batch-size 64 "
                      "--lr 1e-4 --epochs 4 --workers 1 --eval-every 100"),
    "tiny-vit": (0, f"vitkd.py {TINY} {LIGHT} --teacher none --student deit_t --patch-size 16 "
                    "--batch-size 128 --lr 8e-4 --epochs 12 --workers 1"),
    "tiny-cnn": (0, f"dearkd.py {TINY} {LIGHT} --train-teacher resnet18 --batch-size 128 "
                    "--lr 2e-3 --epochs 10 --workers 1"),
    "cifar-cnn": (0, f"dearkd.py {CIFAR} {LIGHT} --train-teacher cifar_resnet56 "
                     "--init data/cifar_resnet56.pth --batch-size 128 --lr 1e-3 --epochs 3 "
                     "--workers 1 --eval-every 100"),
    # It has seen a quarter of the images alone, the same as its student
    "cifar-cnn-quarter": (0, f"dearkd.py {CIFAR} {LIGHT} --train-teacher cifar_resnet20 "
                             "--data-fraction 0.25 --batch-size 128 --lr 2e-3 --epochs 16 "
                             "--workers 1 --eval-every 100"),
    # It teaches nobody: judge_images.py asks it what it sees in made images
    "verifier": (1, f"dearkd.py {CIFAR} {LIGHT} --train-teacher cifar_resnet20 --batch-size 128 "
                    "--lr 2e-3 --epochs 4 --workers 1")}

# {table: {row: command}}, without --seed and --out. SEED stands for the run's seed
TABLES = {
    "vitkd": {
        "alone": f"{VITKD} {CIFAR_FIFTH} --patch-size 8 --epochs 8 --teacher none",
        "NKD": f"{VITKD} {CIFAR_FIFTH} --patch-size 8 --epochs 8 {CIFAR_VIT} --alpha 0 --beta 0",
        "ViTKD": f"{VITKD} {CIFAR_FIFTH} --patch-size 8 --epochs 8 {CIFAR_VIT} --no-nkd",
        "ViTKD + NKD": f"{VITKD} {CIFAR_FIFTH} --patch-size 8 --epochs 8 {CIFAR_VIT}"},
    "attndistill": {
        "projector alignment":
            f"{ATTN} {CIFAR_FIFTH} --patch-size 8 --epochs 8 {CIFAR_VIT} --lambda-a 0",
        "+ attention guidance": f"{ATTN} {CIFAR_FIFTH} --patch-size 8 --epochs 8 {CIFAR_VIT}"},
    "attndistill-tiny": {
        "projector alignment": f"{ATTN} {TINY} --patch-size 16 --epochs 8 {TINY_VIT} --lambda-a 0",
        "+ attention guidance": f"{ATTN} {TINY} --patch-size 16 --epochs 8 {TINY_VIT}"},
    "dearkd": {
        "alone": f"{DEARKD} --teacher none --mhca-blocks 0",
        "the CNN's class": f"{DEARKD} {CIFAR_CNN} --hints none --mhca-blocks 0",
        "+ early hints": f"{DEARKD} {CIFAR_CNN} --mhca-blocks 0",
        "+ MHCA: DearKD": f"{DEARKD} {CIFAR_CNN}",
        "later hints instead": f"{DEARKD} {CIFAR_CNN} --hints 1:2,3:3 --mhca-blocks 0",
        "later hints + MHCA": f"{DEARKD} {CIFAR_CNN} --hints 1:2,3:3"},
    "dearkd-tiny": {
        "alone": f"{TINY_DEARKD} --teacher none --mhca-blocks 0",
        "the CNN's class": f"{TINY_DEARKD} {TINY_CNN} --hints none --mhca-blocks 0",
        "+ early hints": f"{TINY_DEARKD} {TINY_CNN} --mhca-blocks 0",
        "+ MHCA: DearKD": f"{TINY_DEARKD} {TINY_CNN}",
        "later hints instead": f"{TINY_DEARKD} {TINY_CNN} --hints 1:2,3:3 --mhca-blocks 0",
        "later hints + MHCA": f"{TINY_DEARKD} {TINY_CNN} --hints 1:2,3:3",
        "first-middle-last hints + MHCA": f"{TINY_DEARKD} {TINY_CNN} --hints 0:1,3:2,5:3",
        "DearKD, T = 4": f"{TINY_DEARKD} {TINY_CNN} --soft 4"},
    "data-free": {
        "DeepInversion": f"{DATA_FREE} --data {OUT}/made0",
        "DF-DearKD": f"{DATA_FREE} --data {OUT}/made1",
        "2,000 real images": f"{DATA_FREE} --data data/cifar10 --data-fraction 0.04"},
    "imagenet-attndistill": {
        "projector alignment": f"{ATTN} {TINY_LARGE} {IMAGENET_VIT} --epochs 6 --lambda-a 0",
        "+ attention guidance": f"{ATTN} {TINY_LARGE} {IMAGENET_VIT} --epochs 6"},
    "imagenet-vitkd": {
        "alone": f"{VITKD} {TINY_LARGE} --epochs 6 --teacher none",
        "ViTKD + NKD": f"{VITKD} {TINY_LARGE} --epochs 6 {IMAGENET_VIT_20}"},
    "downstream": {  # --init: row 1 of attndistill, row 3 of dearkd-tiny, row 1 of dearkd-half
        "AttnDistill on CIFAR-10, then 10 % of its labels":
            f"vitkd.py {FINE_TUNE} --image-size 32 --init {OUT}/attndistill-1-SEED/student.pth",
        "10 % of CIFAR-10's labels alone": f"vitkd.py {FINE_TUNE} --image-size 32",
        "DearKD on Tiny-ImageNet-20, then 10 % of CIFAR-10":
            f"dearkd.py {FINE_TUNE} --image-size 64 --init {OUT}/dearkd-tiny-3-SEED/student.pth",
        "10 % of CIFAR-10 alone, at 64 px": f"dearkd.py {FINE_TUNE} --image-size 64",
        "DearKD on half of CIFAR-10, then Tiny-ImageNet-20 at 32 px":
            f"{TINY_32} --init {OUT}/dearkd-half-1-SEED/student.pth",
        "Tiny-ImageNet-20 alone, at 32 px": TINY_32},
    "cifar-vitkd": {
        "alone": f"{ALL_VITKD} --teacher none",
        "NKD": f"{ALL_VITKD} {CIFAR_DEIT} --alpha 0 --beta 0",
        "ViTKD": f"{ALL_VITKD} {CIFAR_DEIT} --no-nkd",
        "ViTKD + NKD": f"{ALL_VITKD} {CIFAR_DEIT}",
        "ViTKD's generation alone": f"{ALL_VITKD} {CIFAR_DEIT} --no-nkd --alpha 0",
        "ViTKD's mimicking alone": f"{ALL_VITKD} {CIFAR_DEIT} --no-nkd --beta 0"},
    "cifar-attndistill": {
        "ImageNet teacher, projector alignment": f"{ALL_ATTN} {IMAGENET_VIT} --lambda-a 0",
        "ImageNet teacher, + attention guidance": f"{ALL_ATTN} {IMAGENET_VIT}",
        "fine-tuned teacher, projector alignment": f"{ALL_ATTN} {CIFAR_DEIT} --lambda-a 0",
        "fine-tuned teacher, + attention guidance": f"{ALL_ATTN} {CIFAR_DEIT}",
        "ImageNet teacher, lambda_a = 0.03": f"{ALL_ATTN} {IMAGENET_VIT} --lambda-a 0.03",
        "ImageNet teacher, lambda_a = 0.3": f"{ALL_ATTN} {IMAGENET_VIT} --lambda-a 0.3",
        # A later flag wins: 4 x 4 patches of 28 pixels beside the teacher's 7 x 7
        "ImageNet teacher, student of 4 x 4 patches, projector alignment":
            f"{ALL_ATTN} {IMAGENET_VIT} --patch-size 28 --lambda-a 0",
        "ImageNet teacher, student of 4 x 4 patches, + attention guidance":
            f"{ALL_ATTN} {IMAGENET_VIT} --patch-size 28"},
    "cifar-probe": {  # a linear probe of the students of cifar-attndistill
        "ImageNet teacher, projector alignment": f"{PROBE} --weights {ALIGNED}",
        "ImageNet teacher, + attention guidance": f"{PROBE} --weights {GUIDED}",
        "fine-tuned teacher, projector alignment":
            f"{PROBE} --weights {OUT}/cifar-attndistill-2-SEED/student.pth",
        "fine-tuned teacher, + attention guidance":
            f"{PROBE} --weights {OUT}/cifar-attndistill-3-SEED/student.pth"},
    "cifar-labels": {  # the students of cifar-attndistill, fine-tuned
        "1 % of the labels, random weights": ONE_PERCENT,
        "1 %, after projector alignment": f"{ONE_PERCENT} --init {ALIGNED}",
        "1 %, after + attention guidance": f"{ONE_PERCENT} --init {GUIDED}",
        "10 % of the labels, random weights": TEN_PERCENT,
        "10 %, after projector alignment": f"{TEN_PERCENT} --init {ALIGNED}",
        "10 %, after + attention guidance": f"{TEN_PERCENT} --init {GUIDED}"},
    "dearkd-curve": {
        "10 % of the images, alone": f"{CURVE} --data-fraction 0.1 {ALONE}",
        "10 %, DearKD": f"{CURVE} --data-fraction 0.1 {CIFAR_CNN_JPEG}",
        "25 %, alone": f"{CURVE} --data-fraction 0.25 {ALONE}",
        "25 %, DearKD": f"{CURVE} --data-fraction 0.25 {CIFAR_CNN_JPEG}",
        "100 %, alone": f"{CURVE} {ALONE}",
        "100 %, DearKD": f"{CURVE} {CIFAR_CNN_JPEG}",
        "25 %, DearKD, a CNN of the same 25 %":
            f"{CURVE} --data-fraction 0.25 --teacher {OUT}/cifar-cnn-quarter/student.pth"},
    "dearkd-half": {  # half of the images, also a point of the curve
        "alone": f"{HALF} {ALONE}",
        "DearKD": f"{HALF} {CIFAR_CNN_JPEG}",
        "the CNN's class": f"{HALF} {CIFAR_CNN_JPEG} --hints none --mhca-blocks 0",
        "the CNN's logits, T = 1": f"{HALF} {CIFAR_CNN_JPEG} --hints none --mhca-blocks 0 --soft 1",
        "the CNN's logits, T = 4": f"{HALF} {CIFAR_CNN_JPEG} --hints none --mhca-blocks 0 --soft 4",
        "the CNN's class + early hints": f"{HALF} {CIFAR_CNN_JPEG} --mhca-blocks 0",
        "the CNN's class + MHCA": f"{HALF} {CIFAR_CNN_JPEG} --hints none",
        "DearKD, first-middle-last hints": f"{HALF} {CIFAR_CNN_JPEG} --hints 0:1,3:2,5:3",
        "DearKD, later hints": f"{HALF} {CIFAR_CNN_JPEG} --hints 1:2,3:3",
        "DearKD, one stage": f"{HALF} {CIFAR_CNN_JPEG} --stage1-epochs 4",
        "DearKD, T = 4": f"{HALF} {CIFAR_CNN_JPEG} --soft 4"},
    "made": {  # the CNN's logits alone, one stage
        "500 images, DeepInversion": f"{ALL_500} --data {OUT}/made-500-0",
        "500 images, DF-DearKD": f"{SOFT_500} {DF_DEARKD}",
        "1,000 images, DeepInversion": f"{SOFT_1000} {DEEP_INVERSION}",
        "1,000 images, DF-DearKD": f"{SOFT_1000} {DF_DEARKD}",
        "2,000 images, DeepInversion": f"{SOFT_2000} {DEEP_INVERSION}",
        "2,000 images, DF-DearKD": f"{SOFT_2000} {DF_DEARKD}",
        "2,000 drawn flowers": f"{SOFT_2000} --data {OUT}/shapes",
        "2,000 images of noise": f"{SOFT_2000} --data {OUT}/noise",
        "2,000 real images": f"{SOFT_2000} --data data/cifar10 --data-fraction 0.04",
        "1,000 images, DF-DearKD, first 100 steps at half size":
            f"{ALL_1000} --data {OUT}/made-half-1"},
    "made-training": {  # other ways to train on 2,000 images of DF-DearKD
        "the CNN's class and labels, two stages": f"{MADE} {DF_DEARKD} --epochs 30",
        "the CNN's logits alone, one stage, MixUp and CutMix":
            f"{SOFT_2000} {DF_DEARKD} --mixup 0.8 --cutmix 1",
        "a CNN, cifar_resnet20, by labels":
            f"dearkd.py {MADE_IMAGES} {DF_DEARKD} --train-teacher cifar_resnet20 --epochs 30"},
    "cifar-timm": {  # with timm 1.0.31
        "soft KL, T = 2": f"{BESIDE_TIMM} train {CIFAR_DEIT} --temperature 2",
        "soft KL, T = 4": f"{BESIDE_TIMM} train {CIFAR_DEIT} --temperature 4"}}

# Tables whose runs read students of other tables
READ_STUDENTS = ("downstream", "cifar-probe", "cifar-labels")

# Rows with fewer seeds than SEEDS
FEWER_SEEDS = {
    **{f"dearkd-half/{row}": (0, 1) for row in TABLES["dearkd-half"]},
    "dearkd-half/alone": SEEDS,
    "dearkd-half/DearKD": SEEDS,
    **{f"made-training/{row}": (0,) for row in TABLES["made-training"]},
    **{f"made/{row}": (0,) for row in TABLES["made"]},
    "made/2,000 images, DeepInversion": SEEDS,
    "made/2,000 images, DF-DearKD": SEEDS,
    "cifar-vitkd/ViTKD's generation alone": (0, 2),
    "cifar-vitkd/ViTKD's mimicking alone": (0, 2),
    "cifar-attndistill/ImageNet teacher, lambda_a = 0.03": (0,),
    "cifar-attndistill/ImageNet teacher, lambda_a = 0.3": (0,),
    "cifar-attndistill/ImageNet teacher, student of 4 x 4 patches, projector alignment": (0,),
    "cifar-attndistill/ImageNet teacher, student of 4 x 4 patches, + attention guidance": (0,)}

# The top README's table: {text: (table, row without the method, row with it)}. In the texts stands
# the teacher's figure: top-1, or k-NN for AttnDistill.
SUMMARY = {
    "ViTKD + NKD, CIFAR-10 at 112 px, from a fine-tuned DeiT-T (92)":
        ("cifar-vitkd", "alone", "ViTKD + NKD"),
    "ViTKD without NKD, the same": ("cifar-vitkd", "alone", "ViTKD"),
    "NKD without ViTKD, the same": ("cifar-vitkd", "alone", "NKD"),
    "AttnDistill, k-NN, CIFAR-10 at 112 px, from ImageNet's DeiT-T (57.9)":
        ("cifar-attndistill", "ImageNet teacher, projector alignment",
         "ImageNet teacher, + attention guidance"),
    "AttnDistill, k-NN, Tiny-ImageNet-20, from a DeiT-T (39.1)":
        ("attndistill-tiny", "projector alignment", "+ attention guidance"),
    "DearKD, half of CIFAR-10, from a ResNet-56 (88.7)": ("dearkd-half", "alone", "DearKD"),
    "DearKD with `--soft 4`, the same": ("dearkd-half", "alone", "DearKD, T = 4"),
    "DearKD, a quarter of CIFAR-10, the same": ("dearkd-curve", "25 %, alone", "25 %, DearKD"),
    "DearKD, Tiny-ImageNet-20, from a ResNet-18 (66.1)":
        ("dearkd-tiny", "alone", "+ MHCA: DearKD"),
    "DearKD with `--soft 4`, the same, from one of 65.9": ("dearkd-tiny", "alone", "DearKD, T = 4"),
    "fine-tuned on 10 % of CIFAR-10, after DearKD on Tiny-ImageNet-20":
        ("downstream", "10 % of CIFAR-10 alone, at 64 px",
         "DearKD on Tiny-ImageNet-20, then 10 % of CIFAR-10"),
    "DF-DearKD, CIFAR-10, no real image, from a ResNet-56 (88.9)":
        ("made", "2,000 images, DeepInversion", "2,000 images, DF-DearKD")}

# ------------------------------------------------------------------ runs


class Run(NamedTuple):
    name: str
    seed: int
    command: str  # with --seed, without --out
    folder: str   # below out/study
    stage: int    # runs of a stage read what runs of earlier stages made


def all_runs():
    """Return {folder: Run}."""
    runs = {}
    for folder, (seed, command) in TEACHERS.items():
        runs[folder] = Run(f"teacher/{folder}", seed, f"{command} --seed {seed}", folder, stage=0)
    for table, rows in TABLES.items():
        stage = 2 if table in READ_STUDENTS else 1
        for seed in SEEDS:  # the rows of a seed in turn: they can share a cache
            for number, (row, command) in enumerate(rows.items()):
                name = f"{table}/{row}"
                if seed not in FEWER_SEEDS.get(name, SEEDS):
                    continue
                folder = f"{table}-{number}-{seed}"
                command_of_seed = command.replace("SEED", str(seed))
                if not command.startswith("eval_knn.py"):  # it draws nothing at random
                    command_of_seed += f" --seed {seed}"
                runs[folder] = Run(name, seed, command_of_seed, folder, stage)
    return runs


def read_results():
    """Return {(name, seed): line of results.jsonl}.

    The first line of a name and seed counts. A teacher that is trained again, since its file is not
    on this machine, gets a second line: that must not change a table."""
    results = {}
    for text in RESULTS.read_text().splitlines():
        line = json.loads(text)
        results.setdefault((line["name"], line["seed"]), line)
    return results


def runs_to_make(part):
    """Return the runs without a line whose name contains `part`, and the teachers they lack."""
    results = read_results()
    runs = all_runs()
    chosen = []
    for run in runs.values():
        if part in run.name and (run.name, run.seed) not in results:
            chosen.append(run)
    for run in chosen:  # the list grows on the way: a student that is read needs its teacher, too
        for folder in re.findall(rf"{OUT}/([\w-]+)/student\.pth", run.command):
            exists = (ROOT / OUT / folder / "student.pth").exists()
            if not exists and runs[folder] not in chosen:
                chosen.append(runs[folder])
    return chosen


def cpu_model():
    cpuinfo = Path("/proc/cpuinfo")  # Linux alone has it
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        if found:
            return found[1]
    return platform.processor()


def read_epochs(log):
    """Return the records of a log.jsonl, without what is no number."""
    epochs = []
    for text in log.read_text().splitlines():
        record = json.loads(text)
        numbers = {key: x for key, x in record.items() if isinstance(x, (int, float))}
        epochs.append(numbers)
    return epochs


def read_probe(text):
    """Return the record of what eval_knn.py prints."""
    knn20 = re.search(r"k = 20 +top-1 +([\d.]+)", text)
    linear = re.search(r"linear probe +top-1 +([\d.]+)", text)
    return {"top1": float(linear[1]), "knn20": float(knn20[1])}


def make(run, cache=None):
    """Run a script on one core. Return its line, or None if it failed."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.strip()
    date = time.strftime("%Y-%m-%d")
    # The folder gets its name at the end, so that an interrupted run is not taken for a teacher
    unfinished = f"{OUT}/{run.folder}.unfinished"
    shutil.rmtree(ROOT / unfinished, ignore_errors=True)
    is_probe = run.command.startswith("eval_knn.py")  # the only script without --out and --seed
    command = shlex.split(run.command)
    if not is_probe:
        command += ["--out", unfinished]
    if cache:
        command = ["tests/evidence/cached_teacher.py", cache, *command]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        (ROOT / OUT).mkdir(parents=True, exist_ok=True)
        (ROOT / OUT / f"{run.folder}.err").write_text(f"$ python {run.command}\n{done.stdout}")
        print(f"{run.name}, seed {run.seed}: failed, see {OUT}/{run.folder}.err", flush=True)
        return None
    if is_probe:
        epochs = [read_probe(done.stdout)]
    else:
        out = ROOT / OUT / run.folder
        shutil.rmtree(out, ignore_errors=True)  # of a run whose line was deleted
        (ROOT / unfinished).rename(out)
        epochs = read_epochs(out / "log.jsonl")
    return {
        "name": run.name,
        "seed": run.seed,
        "command": f"python {run.command}",
        "commit": commit,
        "cpu": cpu_model(),
        "amp": best_precision(torch.device("cpu")),  # what the scripts choose
        "date": date,
        "versions": {"torch": version("torch"), "torchvision": version("torchvision")},
        "epochs": epochs}


def make_all(part, cache=None):
    """Make the chosen runs, two at a time, and append the line of each as it ends."""
    chosen = runs_to_make(part)
    for stage in (0, 1, 2):
        with ThreadPoolExecutor(max_workers=2) as pool:
            futures = [pool.submit(make, run, cache) for run in chosen if run.stage == stage]
            for future in as_completed(futures):
                line = future.result()
                if line:
                    with RESULTS.open("a") as results:
                        results.write(json.dumps(line, ensure_ascii=False) + "\n")
                    print(f"{line['name']}, seed {line['seed']}: {top1(line)}", flush=True)


# ------------------------------------------------------------------ tables


def top1(line):
    """Return the last top-1 in percent: the classifier's, or k-NN's (k = 20) in AttnDistill."""
    for record in reversed(line["epochs"]):
        for key in ("top1", "knn20"):
            if key in record:
                return record[key]


def seeds_top1(results, table, row):
    found = []
    for seed in SEEDS:
        line = results.get((f"{table}/{row}", seed))
        if line:
            found.append(top1(line))
    return found


def mean_and_deviation(values):
    if len(values) == 1:
        return f"{values[0]:.1f} (one seed)"
    return f"{statistics.mean(values):.1f} ({statistics.stdev(values):.1f})"


def without_and_with(results, table, rows):
    return [mean_and_deviation(seeds_top1(results, table, row)) for row in rows]


def gain(results, table):
    """Return "without -> with" for the top README's table of methods."""
    for source, *rows in SUMMARY.values():
        if source == table:
            return " -> ".join(without_and_with(results, table, rows))
    raise KeyError(f"SUMMARY has no row of the table {table}")


def summary_table(results):
    lines = ["| method, images | without | with |", "|---|---|---|"]
    for text, (table, *rows) in SUMMARY.items():
        cells = " | ".join(without_and_with(results, table, rows))
        lines.append(f"| {text} | {cells} |")
    return "\n".join(lines)


def study_table(results, table):
    """Return the table of a study, without rows that were not run."""
    if table == "summary":
        return summary_table(results)
    lines = ["| student | seeds 0, 1, 2 | mean (deviation) |", "|---|---|---|"]
    for row in TABLES[table]:
        values = seeds_top1(results, table, row)
        if not values:
            continue
        seeds = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {row} | {seeds} | {mean_and_deviation(values)} |")
    return "\n".join(lines)


def fill(path, results):
    """Fill the tables between <!-- study NAME --> and <!-- end -->, and <!-- gain NAME -->."""
    def filled_table(match):
        return f"{match[1]}{study_table(results, match[2])}\n{match[3]}"

    def filled_gain(match):
        return f"{match[1]}{gain(results, match[2])}{match[3]}"

    text = path.read_text()
    text = re.sub(r"(<!-- study (\S+) -->\n).*?(<!-- end -->)", filled_table, text, flags=re.DOTALL)
    text = re.sub(r"(<!-- gain (\S+) -->).*?(<!-- end -->)", filled_gain, text)
    path.write_text(text)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments == ["tables"]:
        lines = read_results()
        fill(ROOT / "README.md", lines)
        fill(Path(__file__).with_name("README.md"), lines)
    elif arguments[:1] == ["run"] and len(arguments) <= 3:
        part = arguments[1] if len(arguments) > 1 else ""
        cache = arguments[2] if len(arguments) > 2 else None
        make_all(part, cache)
    else:
        sys.exit(__doc__)

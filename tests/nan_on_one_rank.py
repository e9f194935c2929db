"""Run by torchrun: attndistill.py with images that are NaN in some batches, on rank 1 only.

    torchrun --nproc_per_node 2 tests/nan_on_one_rank.py OUT NUMBER_OF_BAD_BATCHES
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import attndistill
import common

out, bad = Path(sys.argv[1]), int(sys.argv[2])
teacher = out.with_name(f"{out.name}-teacher.pth")
arch = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}


class Epoch(common.Epoch):
    def batches(self):
        for step, (images, target, parts) in enumerate(super().batches()):
            if common.rank() == 1 and 2 <= self.epoch * len(self.loader) + step < 2 + bad:
                images = torch.full_like(images, float("nan"))
            yield images, target, parts


def main():
    if common.local_rank() == 0:
        common.save_checkpoint(teacher, model=attndistill.ViT(**arch).state_dict(), arch=arch,
                               script="attndistill", top1=None)
    attndistill.main()


common.Epoch = Epoch
sys.argv[1:] = ["--data", "shapes", "--data-fraction", "0.03", "--image-size", "16",
                "--patch-size", "4", "--student", "micro", "--batch-size", "12", "--epochs", "2",
                "--eval-every", "9", "--teacher", str(teacher), "--out", str(out)]
common.run(main)

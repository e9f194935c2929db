"""LightlyTrain's default distillation and attndistill.py on the same images and models.

    python tests/evidence/lightlytrain.py train tiny|cifar OUT SEED [RATE]   # OUT/student.pth
    python tests/evidence/lightlytrain.py speed ours|lightly|lightly-default

Run it in an environment with lightly-train 0.18.0 and timm, from the root of the repository.
train: micro <- DeiT-T with ImageNet's weights (data/deit_tiny_imagenet.pth), one data worker, on
       the images of SETTINGS. RATE: the peak learning rate (default: its own).
speed: vit_s <- vit_b16 with random weights, 224 px, batch 8, the same images, one data worker.
       Seconds from the start of Python to the end of the first step, then images/s. lightly takes
       bf16 where ours does. lightly-default takes the precision that it chooses itself.
"""

import time

STARTED = time.time()  # before the imports, which count, too

import os
import sys

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, os.getcwd())

import attndistill
import common

STEPS = 10
# The precision that attndistill.py takes on this machine
BF16 = common.best_precision(torch.device("cpu")) == "bf16"
PRECISION = "bf16-mixed" if BF16 else "32-true"
SETTINGS = {
    "tiny": {"data": "data/tiny_imagenet20", "image_size": 64, "batch_size": 128, "epochs": 4,
             "precision": "32-true"},
    "cifar": {"data": "data/cifar10", "image_size": 112, "batch_size": 64, "epochs": 1,
              "precision": PRECISION}}


def timm_vit(image_size, patch_size, dim, depth, num_heads, num_classes=0):
    import timm
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=image_size, patch_size=patch_size, embed_dim=dim,
        depth=depth, num_heads=num_heads, num_classes=num_classes, dynamic_img_size=True)


def lightly(out, seed, student, teacher, image_size, data="data/tiny_imagenet20", **more):
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"
    import lightly_train
    torch.manual_seed(seed)
    lightly_train.pretrain(
        out=out, data=f"{data}/train", model=student(), seed=seed, num_workers=1,
        accelerator="cpu", overwrite=True, method_args={"teacher": teacher()},
        transform_args={"image_size": [image_size] * 2}, **more)


def train(name, out, seed, rate=None):
    settings = SETTINGS[name]
    arch = {**attndistill.SIZES["micro"], "image_size": settings["image_size"], "patch_size": 16,
            "num_classes": 0}

    def teacher():
        vit = timm_vit(224, 16, **attndistill.SIZES["vit_t"], num_classes=1000)
        vit.load_state_dict(torch.load("data/deit_tiny_imagenet.pth", weights_only=True)["model"])
        vit.reset_classifier(0)
        return vit

    # It multiplies the rate by sqrt(batch size / 1536), so that this is the rate that is used
    factor = (1536 / settings["batch_size"]) ** 0.5
    optim_args = {"lr": float(rate) * factor} if rate else None
    lightly(out, int(seed), lambda: timm_vit(**arch), teacher, optim_args=optim_args, **settings)
    state = torch.load(f"{out}/exported_models/exported_last.pt", weights_only=True)
    torch.save({"model": state, "arch": arch, "script": "attndistill"}, f"{out}/student.pth")


def speed(which):
    ends = []

    def after_step(*_):
        ends.append(time.time())
        if len(ends) == STEPS:
            rate = 8 * (STEPS - 2) / (ends[-1] - ends[1])  # the first two steps warm up
            print(f"{which:16s} first step after {ends[0] - STARTED:5.1f} s, then {rate:6.2f} "
                  "images/s", flush=True)
            os._exit(0)

    register_optimizer_step_post_hook(after_step)
    size = {name: {**attndistill.SIZES[name], "image_size": 224, "patch_size": 16}
            for name in ("vit_s", "vit_b")}
    if which == "ours":
        teacher = attndistill.ViT(**size["vit_b"], num_classes=0)
        torch.save(teacher.state_dict(), "out/vit_b16.pth")
        attndistill.main("--data data/tiny_imagenet20 --teacher vit_b16 --batch-size 8 --workers 1 "
                         "--teacher-weights out/vit_b16.pth --out out/speed".split())
    else:
        lightly("out/speed-lightly", 0, lambda: timm_vit(**size["vit_s"]),
                lambda: timm_vit(**size["vit_b"]), 224, epochs=1, batch_size=8,
                **{"precision": PRECISION} if which == "lightly" else {})


if __name__ == "__main__":
    {"train": train, "speed": speed}[sys.argv[1]](*sys.argv[2:])

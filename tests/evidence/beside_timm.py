"""timm's distillation tasks and vitkd.py on the same images, models and steps.

    python tests/evidence/beside_timm.py train --teacher STUDENT.PTH --temperature 4 --out OUT
    python tests/evidence/beside_timm.py speed

It needs timm 1.0.31. train: a loop around timm's LogitDistillationTask, with its default weights,
1 for cross-entropy and 1 for the soft KL divergence. All else is that of vitkd.py with the same
flags: images, augmentation, first weights of the student, optimiser, learning rates, precision.
speed: images/s of a training step, without loading images: timm's logit and feature tasks, NKD and
ViTKD + NKD in turn. DeiT-T teaches `micro` with random weights, 112 px, batch 64.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import timm
import torch
from timm.task import FeatureDistillationTask, LogitDistillationTask
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import vitkd

IMAGE_SIZE = 112
LR = 1e-3
DEVICE = torch.device("cpu")
AUTOCAST = torch.autocast("cpu", torch.bfloat16, common.best_precision(DEVICE) == "bf16")
CROSS_ENTROPY = nn.CrossEntropyLoss(label_smoothing=0.1)
common.choose_attention_kernel(DEVICE, common.best_precision(DEVICE))  # for all: it is about CPUs


def timm_vit(student, image_size, num_classes):
    """Return timm's ViT of the sizes of one of vitkd.py. Its config has ImageNet's mean and std."""
    sizes = vitkd.SIZES[student]
    return timm.create_model(
        "deit_tiny_patch16_224", img_size=image_size, num_classes=num_classes,
        embed_dim=sizes["dim"], depth=sizes["depth"], num_heads=sizes["num_heads"])


def train_step(compute_losses, parameters, optimizer):
    """Make a step. Return {name: loss}; their sum is minimised."""
    with AUTOCAST:
        losses = compute_losses()
    sum(losses.values()).backward()
    nn.utils.clip_grad_norm_(parameters, 5.0)
    optimizer.step()
    optimizer.zero_grad()
    return losses


def train(args):
    train_images, val_images = common.load_data(args.data, None, IMAGE_SIZE)
    num_classes = len(train_images.classes)
    augment = common.train_transform(IMAGE_SIZE, (0.5, 1.0))
    train_set = common.Images(train_images, range(len(train_images)), augment, args.seed)
    val_set = common.Images(val_images, range(len(val_images)),
                            common.val_transform(IMAGE_SIZE), replace_unreadable=False)
    train_batches = common.train_loader(train_set, args.batch_size, accum=1, workers=1,
                                        seed=args.seed)
    val_batches = common.val_loader(val_set, args.batch_size, workers=1)

    student = timm_vit("micro", IMAGE_SIZE, num_classes)
    torch.manual_seed(args.seed)
    same = vitkd.ViT(**vitkd.SIZES["micro"], image_size=IMAGE_SIZE, patch_size=16,
                     num_classes=num_classes)
    student.load_state_dict(same.state_dict())
    teacher = vitkd.load_teacher(args.teacher, None, num_classes, IMAGE_SIZE)
    task = LogitDistillationTask(student, teacher, CROSS_ENTROPY, temperature=args.temperature)

    def losses_of(images, target):
        outputs = task(images, target)  # "loss" is the sum of these two
        return {"ce": outputs["task_loss"], "kl": outputs["kd_loss"]}

    groups = common.parameter_groups(student, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), fused=True)

    log = []
    for epoch in range(args.epochs):
        train_batches.sampler.set_epoch(epoch)
        train_set.epoch = epoch
        task.train()
        loss_sums = {"ce": 0.0, "kl": 0.0}
        batches = common.TimedBatches(train_batches, epoch, args.epochs, args.batch_size)
        for step, (images, target) in enumerate(batches, start=1):
            lr = common.learning_rate(epoch + step / len(train_batches), args.epochs, LR,
                                      min_lr=1e-5, warmup_epochs=20)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = train_step(partial(losses_of, images, target), student.parameters(), optimizer)
            for name, term in losses.items():
                loss_sums[name] += term.item()
        means = {name: total / len(train_batches) for name, total in loss_sums.items()}
        log.append({"epoch": epoch + 1, **means, "lr": lr, **batches.speed()})
    log[-1]["top1"] = common.evaluate(student, val_batches, DEVICE, AUTOCAST)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    Path(args.out, "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    print(log[-1])


def speed(batch_size=64, rounds=5, steps=8):
    images = torch.randn(batch_size, 3, 112, 112)
    target = torch.randint(10, (batch_size,))
    arch = {"image_size": 112, "patch_size": 16, "num_classes": 10}

    def timm_task(kind, **weights):
        task = kind(timm_vit("micro", 112, 10), timm_vit("deit_t", 112, 10), CROSS_ENTROPY,
                    **weights)
        task.teacher.requires_grad_(False)
        return task.trainable_module, lambda: {"loss": task(images, target)["loss"]}

    def ours(alpha, beta):
        teacher = vitkd.ViT(**vitkd.SIZES["deit_t"], **arch).requires_grad_(False).eval()
        student = vitkd.ViT(**vitkd.SIZES["micro"], **arch)
        model = vitkd.Distillation(student, vitkd.ViTKDLoss(96, 192, alpha, beta))

        def losses():
            with torch.no_grad():
                teacher_features = teacher.features(images)
            return model(images, target, teacher_features)
        return model, losses

    methods = {
        "timm's logit task": timm_task(LogitDistillationTask, temperature=4.0),
        "timm's feature task": timm_task(FeatureDistillationTask),
        "NKD": ours(0, 0),
        "ViTKD + NKD": ours(3e-5, 3e-6)}
    optimizers = {name: torch.optim.AdamW(module.parameters(), 1e-3, fused=True)
                  for name, (module, _) in methods.items()}
    speeds = {name: [] for name in methods}
    for _ in range(1 + rounds):  # the first warms up
        for name, (module, losses) in methods.items():
            started = time.perf_counter()
            for _ in range(steps):
                train_step(losses, module.parameters(), optimizers[name])
            speeds[name].append(steps * batch_size / (time.perf_counter() - started))
    for name, values in speeds.items():
        rates = ", ".join(f"{value:.0f}" for value in values[1:])
        print(f"{name:20s} images/s {rates}; median {statistics.median(values[1:]):.0f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Beside timm", allow_abbrev=False)
    parser.add_argument("what", choices=("train", "speed"))
    parser.add_argument("--teacher", help="student.pth of vitkd.py, a DeiT-T")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/timm")
    args = parser.parse_args(argv)
    if args.what == "train":
        train(args)
    else:
        speed()


if __name__ == "__main__":
    main()

"""Run by torchrun or alone: gradients of one ViTKD + NKD step on fixed images, to a file.

    torchrun --nproc_per_node 2 tests/ddp_gradients.py OUT MICRO_BATCH

The mask, the one thing a step draws, is made a function of the patch's place, so that it is the
same however the batch is divided; everything else is vitkd.py's and common.py's own code.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import vitkd


def main():
    out, micro_batch = sys.argv[1], int(sys.argv[2])
    device = common.init_processes()
    args = argparse.Namespace(batch_size=12, micro_batch=micro_batch, seed=0, workers=0, epochs=1,
                              dry_run=False, clip_grad=0.0, label_smoothing=0.1, no_nkd=False,
                              gamma=1.0, tau=1.0, out="none")
    vitkd.random_mask = lambda B, N, *rest: (torch.arange(N) % 2 == 0).expand(B, N)
    torch.manual_seed(1)
    student = vitkd.ViT(16, 4, 24, 3, 3, 10)
    model = vitkd.Objective(student, vitkd.ViTKDLoss(24, 36, 1e-2, 1e-2), args).double()
    teacher = vitkd.ViT(16, 4, 36, 3, 3, 10).double().requires_grad_(False).eval()
    ddp, accumulate = model, contextlib.nullcontext
    if common.world_size() > 1:
        ddp = vitkd.DistributedDataParallel(model, gradient_as_bucket_view=True)
        accumulate = ddp.no_sync
    data = common.Shapes("train", 16, 23)  # two batches, of 12 and 11 images: shares that differ
    books = common.Epoch(common.train_loader(data, args), 0, args, device)
    gradients = {}

    class Record:  # an optimiser that keeps the gradients and moves nothing
        param_groups = ({"params": list(model.parameters())},)

        def step(self):
            for name, parameter in model.named_parameters():
                gradients[f"{len(gradients)} {name}"] = parameter.grad.clone()

        def zero_grad(self):
            model.zero_grad()

    class NoScaler:
        unscale_ = update = staticmethod(lambda *_: None)
        get_scale = staticmethod(lambda: 1.0)
        step = staticmethod(lambda optimizer: optimizer.step())

    for images, target, parts in books.batches():
        images = images.double()
        for part, weight, last in parts:
            with contextlib.nullcontext() if last else accumulate():
                losses = ddp(images[part], target[part], teacher.features(images[part]))
                (weight * sum(losses.values())).backward()
            books.add(losses, weight)
        books.optimizer_step(Record(), NoScaler())
    record = books.record()
    if common.rank() == 0:
        torch.save({"gradients": gradients, "losses": {k: record[k] for k in losses}}, out)


common.run(main)

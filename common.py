"""What every script needs and no paper is about: processes, data, precision, checkpoints, log."""

import argparse
import datetime
import functools
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import torch
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2

# ImageNet's mean and standard deviation, for every data set: released teachers expect them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # this process's number on its machine
WORKERS = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
MAY_DIFFER = ("data", "val", "init", "teacher_weights", "workers", "accum", "compile", "out",
              "resume", "eval_every", "synthesize")  # what may change when a run is resumed

# ------------------------------------------------------------------ processes


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_processes():
    """Join torchrun's process group if there is one, and return this process's device."""
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", LOCAL_RANK), "nccl"
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    return device


def sum_over_processes(values, device):
    """Sum a list of numbers elementwise over all processes."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(values)
    return values.tolist()


def mean_losses(totals, steps, device):
    """Return means over steps and processes of the sums of loss terms {name: scalar}."""
    means = [float(total) / steps / world_size() for total in totals.values()]
    return dict(zip(totals, sum_over_processes(means, device)))


def say(text):
    if rank() == 0:
        print(text, flush=True)


def fail(problem):
    """End the program with one line on stderr and exit status 1."""
    if LOCAL_RANK > 0:
        time.sleep(5)  # the first process speaks for all: torchrun then ends those that wait here
    line = " ".join(str(problem).split())  # torch's messages have many lines
    sys.exit(f"{Path(sys.argv[0]).name}: error: {line[:700]}{' ...' if line[700:] else ''}")


# ------------------------------------------------------------------ data


def train_transform(image_size, scale=(0.08, 1.0), rand_augment=0, random_erasing=0.0):
    """Return the training transform: image -> normalised float (3, S, S). rand_augment: magnitude 0
    (off) to 10 of two operations, each applied with probability 0.5."""
    steps = [v2.PILToTensor(),
             v2.RandomResizedCrop(image_size, scale, interpolation=InterpolationMode.BICUBIC),
             v2.RandomHorizontalFlip()]
    if rand_augment:
        augment = v2.RandAugment(1, rand_augment, num_magnitude_bins=11,  # magnitudes 0, 1, .. 10
                                 interpolation=InterpolationMode.BILINEAR,
                                 fill=[round(255 * channel) for channel in MEAN])
        steps += [v2.RandomApply([augment], p=0.5), v2.RandomApply([augment], p=0.5)]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
                       v2.RandomErasing(random_erasing, value="random")])  # noise for each pixel


def val_transform(image_size):
    """Return the test transform: short side to 256/224 of S bicubic, centre crop, normalise."""
    return v2.Compose([v2.PILToTensor(),
                       v2.Resize(round(image_size * 256 / 224), InterpolationMode.BICUBIC),
                       v2.CenterCrop(image_size),
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


class Images(Dataset):
    """A torchvision data set with a transform: items are (image (3, S, S), label).

    The transform's random numbers depend on (seed, epoch, index) alone, so the number of workers
    and processes changes no image. An unreadable file is named and replaced by the next one.
    """

    def __init__(self, base, indices, transform, seed=0):
        self.base, self.indices, self.transform, self.seed = base, indices, transform, seed
        self.epoch = torch.zeros(1, dtype=torch.long).share_memory_()  # workers see it change

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        for i in range(i, i + len(self)):  # until an image can be read
            index = int(self.indices[i % len(self)])
            try:
                image, label = self.base[index]
                break
            except Exception as error:  # noqa: BLE001 - image decoders raise many kinds
                path = self.base.samples[index][0]
                warnings.warn(f"unreadable image {path}, the next one is taken: {error}")
        else:
            raise RuntimeError("none of the images can be read")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, int(self.epoch), index)))
            return self.transform(image), label


class Shapes(Dataset):
    """Flowers of random colours with 0, 2, 3, 4 or 5 petals, filled or hollow: ten classes."""

    def __init__(self, length, image_size, seed):
        self.image_size, self.seed = image_size, seed
        self.classes, self.targets = "0123456789", [index % 10 for index in range(length)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        label, generator = index % 10, torch.Generator().manual_seed(hash((self.seed, index)))
        size, tilt, left, top = torch.rand(4, generator=generator).tolist()
        axis = torch.linspace(-1, 1, self.image_size)
        x, y = axis + 0.5 * (left - 0.5), axis[:, None] + 0.5 * (top - 0.5)
        petals = (0, 2, 3, 4, 5)[label // 2]
        edge = (0.45 + 0.2 * size) * (1 + 0.4 * (petals * torch.atan2(y, x) + 6.28 * tilt).cos())
        r = torch.hypot(x, y)                                                   # (S, S)
        inside = (r < edge) & ((r > 0.5 * edge) | (label % 2 == 0))
        ground, contrast = torch.rand(2, 3, generator=generator)  # in each colour channel
        image = (ground + (0.3 + 0.4 * contrast) * inside[..., None]) % 1       # (S, S, 3)
        return (255 * image).byte().permute(2, 0, 1), label


def class_balanced_subset(labels, fraction):
    """Return indices of a fixed random part of each class; a larger part contains a smaller one."""
    labels = np.asarray(labels)
    members = [np.random.default_rng([0, c]).permutation(np.flatnonzero(labels == c))
               for c in np.unique(labels)]
    return np.sort(np.concatenate([m[:max(1, round(fraction * len(m)))] for m in members]))


def load_data(args, transform):
    """Return (training set, validation set, number of classes)."""
    try:
        if args.data == "shapes":
            train, val = (Shapes(length, args.image_size, length) for length in (4000, 1000))
        elif args.data in ("cifar10", "cifar100"):
            cifar = getattr(datasets, args.data.upper())
            if LOCAL_RANK == 0:
                cifar("data", download=True)  # the other processes wait
            if world_size() > 1:
                dist.barrier()
            train, val = (cifar("data", split) for split in (True, False))
        else:
            train = datasets.ImageFolder(Path(args.data) / "train")
            val = datasets.ImageFolder(args.val or Path(args.data) / "val")
    except (OSError, RuntimeError) as error:
        fail(f"--data {args.data}: {error}. It must be a folder that holds train/CLASS/* and "
             f"val/CLASS/* (or --val another folder of CLASS/*), or cifar10, cifar100, shapes")
    odd = set(train.classes) ^ set(val.classes)
    if odd:
        fail(f"class folders in only one of training and validation: {', '.join(sorted(odd))}")
    kept = class_balanced_subset(train.targets, args.data_fraction)
    return (Images(train, kept, transform, args.seed),
            Images(val, range(len(val)), val_transform(args.image_size)), len(train.classes))


def make_loader(dataset, args, train):
    """Return a DataLoader of this process's share. Training: a new order each epoch; a step has the
    same images for any number of processes, always as many. Validation: every image once."""
    batch_size = args.batch_size // world_size()
    if train:
        if args.batch_size > len(dataset):
            fail(f"--batch-size {args.batch_size} is more than the {len(dataset)} training images")
        sampler = DistributedSampler(dataset, world_size(), rank(), seed=args.seed, drop_last=True)
    else:
        batch_size = batch_size // args.accum
        sampler = np.random.default_rng(0).permutation(len(dataset))[rank()::world_size()].tolist()
    return DataLoader(dataset, batch_size, sampler=sampler, drop_last=train,
                      num_workers=args.workers, persistent_workers=args.workers > 0,
                      pin_memory=torch.cuda.is_available(),
                      generator=torch.Generator())  # its own, so that it draws none of the loop's


# ------------------------------------------------------------------ precision and schedule


def precision(args, device):
    """Return (autocast, scaler). `with autocast():` runs a forward pass in the chosen precision.

    The scaler is active in fp16 only. args.amp None becomes bf16 where the device multiplies it
    natively, else fp16 on a GPU and off on a CPU. Prints the device: a missing GPU is seen.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        native = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        torch.backends.cudnn.benchmark = True
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        name = "CPU" + cpuinfo.partition("model name")[2].partition("\n")[0]
        native = "bf16" if "avx512_bf16" in cpuinfo or "amx_bf16" in cpuinfo else "off"
        # On CPUs the fused attention kernel is the fastest in float32, but has a slow backward pass
        # in bf16. These two switches hold for CPUs, too: in bf16 matrices are multiplied instead.
        torch.backends.cuda.enable_flash_sdp((args.amp or native) == "off")
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    amp = args.amp = args.amp or native
    say(f"{name}, {world_size()} process(es), amp {amp}, torch {torch.__version__}")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=amp != "off")
    return autocast, torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def parameter_groups(module, weight_decay):
    """AdamW's groups: no weight decay on biases, norms, scales, tokens and position embeddings."""
    decayed, exempt = [], []
    for name, p in module.named_parameters():
        free = p.ndim <= 1 or name.endswith(("_token", "pos_embed", "pos_weight"))
        (exempt if free else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": exempt, "weight_decay": 0.0}]


def learning_rate(epoch, args):
    """Linear warm-up from 0 to args.lr, then a cosine to args.min_lr; epoch may be a fraction."""
    warmup = min(args.warmup_epochs, args.epochs / 10)
    if epoch < warmup:
        return args.lr * epoch / warmup
    progress = (epoch - warmup) / (args.epochs - warmup)
    min_lr = min(args.min_lr, args.lr)
    return min_lr + (args.lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


# ------------------------------------------------------------------ evaluation, checkpoints, log


@torch.inference_mode()
def evaluate(model, loader, device, autocast):
    """Return the top-1 in percent over the images of all processes."""
    model.eval()
    right = count = 0
    for images, target in loader:
        with autocast():
            logits = model(images.to(device, non_blocking=True))
        right += (logits.argmax(1).cpu() == target).sum().item()
        count += len(target)
    right, count = sum_over_processes([right, count], device)
    return 100 * right / count


def save_checkpoint(path, **state):
    """torch.save(state) to `path`, whole or not at all: a kill leaves the old file as it was."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path):
    """Return what torch.save wrote to a file or URL, on the CPU. Raises ValueError if it cannot."""
    number = np.float64(0).__reduce__()[0]
    # Training checkpoints of DINO, iBOT and Mugs hold an argparse.Namespace and numpy numbers.
    harmless = [argparse.Namespace, np.dtype, type(np.dtype("float64")),
                (number, "numpy.core.multiarray.scalar"), (number, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(harmless):
            if str(path).startswith("https://"):  # hex digits in a name start the file's sha256
                return torch.hub.load_state_dict_from_url(
                    path, map_location="cpu", weights_only=True, check_hash="-" in Path(path).name)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - zip, pickle and network raise many kinds
        raise ValueError(f"{path} is missing, damaged, or holds code, which is never run "
                         f"({type(error).__name__})") from error


def check_args(args, limits):
    """End the program if a number is not within limits[name], by default >= 0, counts >= 1."""
    counts = ("batch_size", "accum", "epochs", "image_size", "patch_size", "eval_every",
              "images_per_class", "images_per_batch")
    limits = {"data_fraction": (1e-6, 1), "crop_scale": (1e-6, 1), "lr": (1e-12, 1e3), **limits}
    for name, value in vars(args).items():
        low, high = limits.get(name, (int(name in counts), math.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value} is not between {low:g} and {high:g}")
    if args.image_size % args.patch_size:
        fail(f"--image-size {args.image_size} is no multiple of --patch-size {args.patch_size}")
    parts = int(os.environ.get("WORLD_SIZE", "1")) * args.accum
    if args.batch_size % parts:
        fail(f"--batch-size {args.batch_size} is not divisible by processes x --accum = {parts}")


def open_run(args):
    """Make the folder args.out; return its last.pth's content if the run continues, else None."""
    last, checkpoint = Path(args.out) / "last.pth", None
    try:
        if last.exists() and not args.resume:
            fail(f"{args.out} already holds a run: add --resume, or choose another folder")
        if last.exists():
            checkpoint = load_checkpoint(last)
            old, new = checkpoint["args"], vars(args)
            changed = [f"--{name.replace('_', '-')} {new.get(name)}, before {old.get(name)}"
                       for name in {**old, **new}
                       if name not in MAY_DIFFER and new.get(name) != old.get(name)]
            if changed:
                fail(f"{last} was written with other settings: {'; '.join(changed)}")
            say(f"continuing the run in {args.out}")
        if rank() == 0:
            last.parent.mkdir(parents=True, exist_ok=True)
            (last.parent / "args.json").write_text(json.dumps(vars(args), indent=1))
    except (OSError, ValueError) as error:
        fail(f"--out {args.out}: {error}")
    return checkpoint


def log_epoch(args, log):
    """Complete the last record of `log`, print it as one line, write all records to log.jsonl."""
    # Without a GPU the first is 0: then the process's peak memory, which Linux gives in KiB
    peak = torch.cuda.max_memory_allocated() or 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    log[-1]["peak_memory_gb"] = peak / 2**30
    if rank() == 0:
        (Path(args.out) / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    left = sum(record["seconds"] for record in log) / len(log) * (args.epochs - len(log))
    numbers = {name: x for name, x in log[-1].items() if not isinstance(x, list)}
    shown = "  ".join(f"{name} {x:.4g}" for name, x in numbers.items())
    say(f"{shown}  left {datetime.timedelta(seconds=round(left))}")

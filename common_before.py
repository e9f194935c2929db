"""What all scripts need and no paper is about: processes, images, schedule, checkpoints, logs.

Nothing here knows a method or a loss. In the order of a run:

    run(main)                          errors as one line, signals, exit statuses
    init_processes()                   torchrun's ranks or a single process, GPU or CPU
    load_data(args, transform)         ImageNet folders, CIFAR, or shapes drawn in memory
    train_loader, val_loader           every image once an epoch, shards without overlap
    parameter_groups, learning_rate    AdamW's groups; warm-up and cosine
    Epoch                              an epoch's batches, update steps, and its line in the log
    evaluate                           top-1 and top-5 over all ranks
    save_checkpoint, load_checkpoint   whole or not at all; read without running code
    open_run, log_epoch                --out, --resume, log.jsonl
    Parser, *_flags, check_flags       the command line that all scripts share
"""

import argparse
import contextlib
import datetime
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

# ImageNet's channel statistics, for every data set: all released teachers expect them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DRY_RUN_STEPS = 20
WORKER_TIMEOUT = 600  # seconds for a batch; a disk may hang for ever
SCRIPT = Path(sys.argv[0]).name
# What a resumed run may change, and one process against another: it alters nothing (--compile:
# rounding, and which random numbers are drawn in the step). The content of data, val and
# teacher_weights is compared by checksums.
FREE_ON_RESUME = {"data", "data_root", "val", "teacher_weights", "out", "resume", "workers",
                  "micro_batch", "eval_every", "compile", "dry_run"}


# ------------------------------------------------------------------ errors, signals, processes


class Abort(Exception):
    """Ends the program with one line on stderr and `status`: 2 wrong input, 1 training failed.

    Local rank 0 prints it for all; `alone` says that only this process knows of it.
    """

    def __init__(self, message, status=2, alone=False):
        super().__init__(message)
        self.status, self.alone = status, alone


class Stopped(BaseException):
    """SIGTERM or SIGINT, status 143 or 130. Like KeyboardInterrupt, past any `except Exception`."""

    def __init__(self, message, status=128):
        super().__init__(message)
        self.status = status


class Unreadable(Exception):
    """So many files in a row cannot be read that it is not the files."""


_held = False  # then a signal lets the step under way finish: hold_signals()
_signal = 0  # number of the SIGTERM or SIGINT that was received


def _receive(number, frame):
    global _signal
    first, _signal = not _signal, number
    if first and not _held:
        stop(number, "before anything was kept")


def hold_signals(hold=True):
    """From here on a signal only sets signalled(): the loop finishes its step and stops itself. (A
    loader that is broken off anywhere may leave a lock taken, and its tear-down waits for that.)
    Returns what was so before."""
    global _held
    before, _held = _held, hold
    return before


def stop(number, when):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if a loader's workers die of it, too: no error
    raise Stopped(f"stopped by {signal.Signals(number).name} {when}", 128 + number)


def signalled():
    """Was a SIGTERM or SIGINT received? Then break off, and stop_together()."""
    return _signal


def stop_together(device, when):
    """Stop all ranks if any was signalled; all must call this."""
    number, = all_reduce([_signal], device, dist.ReduceOp.MAX)
    if number:
        stop(int(number), when)


def run(main):
    """Run a script's main(); what users can mend becomes one line on stderr and an exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _receive)
    status = 0
    try:
        try:
            main()
        except Unreadable as error:  # from a loader's worker: the message is its last line
            raise Abort(str(error).splitlines()[-1].removeprefix("common.Unreadable: "), 1, True)
        except (Abort, RuntimeError) as error:  # also what a worker's death made of something else
            if str(error).startswith("DataLoader"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # one complaint is enough
                time.sleep(1)  # a signal for all processes may have reached the workers first
            if _signal:
                stop(_signal, "together with its workers; OUT/last.pth keeps the last epoch "
                     "finished")
            if isinstance(error, torch.OutOfMemoryError):
                raise Abort("out of GPU memory: try a smaller --micro-batch (with --synthesize: "
                            "--images-per-batch)", 1, True)
            if str(error).startswith("DataLoader"):
                raise Abort(f"the processes that read images fail, as they do when memory is short "
                            f"(try fewer --workers) or a disk hangs: {error}", 1, True)
            raise
    except (Abort, Stopped) as end:
        if local_rank() == 0 or getattr(end, "alone", False):
            kind = "error: " if isinstance(end, Abort) else ""
            print(f"{SCRIPT}: {kind}{end}", file=sys.stderr, flush=True)
        status = end.status
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if status:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()  # one that hangs would hold up the exit
    if dist.is_initialized():
        if status or dist.get_backend() == "gloo":  # tear-down may wait for a rank that has left
            sys.stdout.flush()
            os._exit(status)
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def init_processes():
    """Join torchrun's process group if there is one. Returns this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > gpus:
            raise Abort(f"{processes} processes for the {gpus} GPUs of this machine: take "
                        f"--nproc_per_node {gpus}")
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=1),  # rank 0 may be downloading
                                device_id=device if device.type == "cuda" else None)
    return device


def local_rank():
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


_reduced = None


def all_reduce_(tensor, op):
    """dist.all_reduce, in place; nothing where there is one process.

    The tensor lives on until the next call. If gloo's thread were the last to hold it, it would
    need Python to free it, and before Python 3.12 a loader's worker that is forked in that moment
    hangs for ever.
    """
    global _reduced
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
        _reduced = tensor


def all_reduce(values, device, op=dist.ReduceOp.SUM):
    """A list of numbers, reduced over all processes (float64)."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    all_reduce_(values, op)
    return values.tolist()


def on_rank_zero(work):
    """work() on rank 0 alone; what it returns on all ranks. If it aborts, all do."""
    box = [None, None]  # result, failure
    if rank() == 0:
        try:
            box[0] = work()
        except (Abort, Stopped) as end:
            box[1] = end
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
        time.sleep(0.1)  # gloo frees its tensors: see all_reduce_()
    if box[1]:
        box[1].alone = False  # rank 0 tells it
        raise box[1]
    return box[0]


def rank_zero_first(load):
    """load() on each rank, on rank 0 (which may download) before the others."""
    loaded = []
    on_rank_zero(lambda: loaded.append(load()))
    try:
        return loaded[0] if rank() == 0 else load()
    except Abort as error:
        error.alone = True  # rank 0 had no such trouble
        raise


def require_same(value, complaint):
    """Raise Abort on all ranks if they have different values."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
        time.sleep(0.1)  # gloo frees its tensors: see all_reduce_()
    if len(set(values)) > 1:
        raise Abort(f"{complaint}: {', '.join(map(str, values))}")


def say(text):
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def warn(text):
    if rank() == 0:
        print(f"{SCRIPT}: warning: {text}", file=sys.stderr, flush=True)


def mix_seed(*numbers):
    """One seed from e.g. (seed, epoch, rank): tuples have unrelated random numbers, but for those
    that differ by zeros at their ends alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ------------------------------------------------------------------ images


def train_transform(image_size, scale=(0.08, 1.0), rand_augment=0, random_erasing=0.0):
    """PIL image -> uint8 (3, S, S): crop, flip, RandAugment (2 operations).

    With RandomErasing there is a fourth plane, set where normalize() shall put noise.
    """
    steps = [RandomResizedCrop(image_size, scale), v2.RandomHorizontalFlip()]
    if rand_augment:
        # The recipe counts magnitudes in tenths of each operation's range: 0, 1, ..., 10.
        fill = [round(255 * channel) for channel in MEAN]
        augment = RandAugment(2, rand_augment, num_magnitude_bins=11, fill=fill,
                              interpolation=InterpolationMode.BICUBIC)  # which needs PIL
        steps += [v2.ToPILImage(), augment, v2.PILToTensor()]
    if random_erasing:
        steps += [functools.partial(torch.nn.functional.pad, pad=(0, 0, 0, 0, 0, 1)),  # (4, S, S)
                  v2.RandomErasing(random_erasing, value=[0, 0, 0, 255])]
    return v2.Compose(steps)


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, bicubic, of a PIL image: what was cropped is resized as a tensor (3, S, S),
    four times as fast."""

    def transform(self, image, params):
        crop = v2.functional.pil_to_tensor(v2.functional.crop(image, **params))
        return v2.functional.resize(crop, self.size, InterpolationMode.BICUBIC)


class RandAugment(v2.RandAugment):
    """torchvision's. It moves images by whole pixels, where the nearest pixel is the bicubic value,
    and soon had (tests/evidence/bench_cpu.md)."""

    def _apply_image_or_video_transform(self, image, transform_id, magnitude, interpolation, fill):
        if transform_id.startswith("Translate"):
            interpolation = InterpolationMode.NEAREST
        return super()._apply_image_or_video_transform(image, transform_id, magnitude,
                                                       interpolation, fill)


def val_transform(image_size):
    """PIL image -> uint8 (3, S, S): short side to 256/224 of S bicubic, centre crop."""
    short_side = round(image_size * 256 / 224)
    return v2.Compose([v2.PILToTensor(),
                       v2.Resize(short_side, interpolation=InterpolationMode.BICUBIC),
                       v2.CenterCrop(image_size)])


def normalize(images, device):
    """A loader's uint8 (B, 3, S, S) -> normalised float (B, 3, S, S) on the device, where a fourth
    plane is set noise (of the loop's random numbers). Drawn shapes are such floats already."""
    images = images.to(device, non_blocking=True)
    if images.is_floating_point():
        return images
    mean, std = channel_statistics(device)
    x = (images[:, :3] - mean).div_(std)
    return x if images.shape[1] == 3 else torch.where(images[:, 3:] > 0, torch.randn_like(x), x)


@functools.cache
def channel_statistics(device):
    """Mean and standard deviation of 0..255, (3, 1, 1) each."""
    return [255 * torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD)]


class Photos(Dataset):
    """A torchvision data set whose randomness and faults are under control.

    Items are asked for by key = epoch * len + index and are (image, label, unreadable). The
    augmentation is seeded by (seed, key) alone: neither the number of workers and processes nor a
    resume changes an image. An unreadable file is named once, counted (`unreadable` = 1) and
    replaced by the next readable one.
    """

    def __init__(self, base, transform, seed=0, indices=None):
        self.base, self.transform, self.seed = base, transform, seed
        self.indices = np.arange(len(base)) if indices is None else indices
        self.named = torch.zeros(len(base), dtype=torch.bool).share_memory_()  # by all workers

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        for unreadable in range(min(100, len(self))):
            index = int(self.indices[(key + unreadable) % len(self)])
            try:
                image, label = self.base[index]
                break
            except Exception as error:  # noqa: BLE001 - decoders raise whatever they like
                if not self.named[index]:
                    self.named[index] = True
                    print(f"{SCRIPT}: unreadable image, replaced by the next: "
                          f"{self.base.samples[index][0]} ({error})", file=sys.stderr, flush=True)
        else:
            raise Unreadable(f"{unreadable + 1} images in a row are unreadable: is the disk gone?")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, key))
            return self.transform(image), label, int(unreadable > 0)


class Shapes(Dataset):
    """Ten classes drawn in memory: disk, square, triangle, ring, cross x plain, striped.

    Colours, size, place and tilt are random, from (seed, split, key) alone; since key = epoch *
    len + index, each epoch of the training split has fresh images. The validation split is fixed.
    """

    def __init__(self, split, image_size, length, seed=0):
        self.classes = [str(label) for label in range(10)]
        self.targets = [index % 10 for index in range(length)]
        self.length, self.size = length, image_size
        self.key = (seed, 0) if split == "train" else (0, 1)

    def __len__(self):
        return self.length

    def __getitems__(self, keys):
        r = torch.stack([torch.rand(17, generator=torch.Generator().manual_seed(
            mix_seed(*self.key, key))) for key in keys])                        # (B, 17) in [0, 1)
        label = torch.tensor(keys) % self.length % 10
        shape, striped = label // 2, label % 2
        axis = torch.linspace(-1, 1, self.size)
        radius, tilt = 0.55 + 0.2 * r[:, 0], 2 * math.pi * r[:, 1]
        x = (axis - 0.4 * (r[:, 2, None] - 0.5))[:, None, :]                    # (B, 1, S)
        y = (axis - 0.4 * (r[:, 3, None] - 0.5))[:, :, None]                    # (B, S, 1)
        cos, sin, radius = (t[:, None, None] for t in (tilt.cos(), tilt.sin(), radius))
        u, v = (cos * x + sin * y) / radius, (cos * y - sin * x) / radius       # (B, S, S)
        far, near = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
        disk = u.square() + v.square()
        inside = torch.stack([disk < 1,                                         # (5, B, S, S)
                              far < 0.85,
                              torch.maximum(v, 0.87 * u.abs() - 0.5 * v) < 0.55,
                              (disk < 1) & (disk > 0.35),
                              (far < 1) & (near < 0.3)])
        inside = inside[shape, torch.arange(len(keys))][:, None]                # (B, 1, S, S)
        stripe = ((9 * u + 6 * r[:, 4, None, None]).sin() > 0) & (striped == 1)[:, None, None]
        colours = torch.arange(3)[:, None] / 3 + 0.15 * r[:, 5:14].view(-1, 3, 3)
        colours = (colours + r[:, None, 14:17]) % 1                             # (B, 3, rgb)
        ground, colour, second = colours[..., None, None].unbind(1)             # (B, 3, 1, 1) each
        images = torch.where(inside, torch.where(stripe[:, None], second, colour), ground)
        images = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return list(zip(images, label.tolist(), [0] * len(keys)))


def class_balanced_subset(labels, fraction):
    """Indices of the first `fraction` of a fixed shuffle of each class: 0.25 is a subset of 0.5."""
    labels = np.asarray(labels)
    members = [np.random.default_rng([0, c]).permutation(np.flatnonzero(labels == c))
               for c in np.unique(labels)]
    return np.sort(np.concatenate([m[:max(1, round(fraction * len(m)))] for m in members]))


def load_data(args, transform):
    """(training set, validation set, number of classes) of --data, or the validation set of --val;
    raises Abort if they aren't there or differ in their classes. Sets args.images, by which other
    processes and resumed runs are known to have the same files.

    `transform` is the training transform; shapes are fresh every epoch and need none.
    """
    train = read_split(args.data, "train", args)
    val = read_split(args.val or args.data, "val", args)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise Abort(f"the classes (folders) of {args.data}/train and of {args.val or args.data}"
                    f"{'' if args.val else '/val'} differ: {', '.join(odd[:5])} in only one of "
                    f"them ({len(odd)} in all)")
    num_classes = len(train.classes)
    checksum = zlib.crc32(repr([getattr(split, "names", "") for split in (train, val)]).encode())
    args.images = f"{len(train)} + {len(val)}, names' checksum {checksum:08x}"
    if not isinstance(train, Shapes):
        train = Photos(train, transform, args.seed,
                       class_balanced_subset(train.targets, args.data_fraction))
    if not isinstance(val, Shapes):
        val = Photos(val, val_transform(args.image_size))
    return train, val, num_classes


def read_split(name, split, args):
    """The "train" or "val" images of `name`, a folder or a word: a data set with .classes, its
    images as they are read (Shapes: as they are drawn). Raises Abort."""
    if name == "shapes":
        length = max(10, round(4000 * args.data_fraction)) if split == "train" else 1000
        return Shapes(split, args.image_size, length, args.seed)
    if name in ("cifar10", "cifar100"):
        dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        try:
            return dataset(args.data_root, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise Abort(f"cannot download {dataset.url} to {args.data_root} ({error}); without a "
                        f"network, unpack that file there, or give --data a folder")
    folder = Path(name) / split
    if args.val and split == "val" and not folder.is_dir():
        folder = Path(name)  # --val may be the folder of class folders itself
    if not folder.is_dir():
        raise Abort(f"no folder {folder}: --data must hold train/CLASS/* and val/CLASS/* (or --val "
                    f"another folder of CLASS/*), or be one of cifar10, cifar100, shapes")
    try:
        images = ClassFolders(folder)
    except (OSError, ValueError) as error:  # ValueError: there is no class folder
        raise Abort(f"no images in {folder}: {error}")
    empty = [images.classes[c] for c in np.setdiff1d(range(len(images.classes)), images.targets)]
    if not len(images):
        raise Abort(f"no images in {folder} (class folders: {', '.join(empty[:5])})")
    if empty:
        warn(f"no images in {folder} of {len(empty)} classes: {', '.join(empty[:5])}")
    return images


class ClassFolders(datasets.ImageFolder):
    """ImageFolder that does not take hidden folders for classes, and whose list of files is two
    arrays: workers that read a list of a million tuples come to have a copy of it each."""

    def __init__(self, folder):
        super().__init__(folder, loader=open_rgb, allow_empty=True)
        self.names = zlib.crc32("\n".join(
            os.path.relpath(path, folder) for path, _ in self.samples).encode(errors="replace"))
        self.samples = self.imgs = Samples(self.samples)
        self.targets = self.samples.labels

    def find_classes(self, directory):
        classes = sorted(entry.name for entry in os.scandir(directory)
                         if entry.is_dir() and not entry.name.startswith("."))
        return classes, {name: i for i, name in enumerate(classes)}


class Samples:
    """[(path, label), ...] without a Python object for each: counting references writes to it."""

    def __init__(self, samples):
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = np.array([label for _, label in samples], int)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return os.fsdecode(self.paths[i]), int(self.labels[i])


def open_rgb(path):
    """The image file as a PIL image of mode RGB, in its right colours."""
    with open(path, "rb") as file:
        image = Image.open(file)
        if max(image.size) > 50 * min(image.size):  # its short side brought to 256 px fills memory
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels are no photo")
        if image.mode.startswith("I"):  # 16 bit grey: PIL would cut values off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "P":  # a palette that may have transparency, which is dropped
            image = image.convert("RGBA")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


class ShardedBatches:
    """Batch sampler: every image once an epoch, the same batches for any number of processes.

    The epoch's permutation is cut into ceil(n / batch_size) batches that differ by one image at
    most (no small last batch, none dropped), each batch into one share a process.
    """

    def __init__(self, length, batch_size, seed):
        self.length, self.seed, self.epoch = length, seed, 0
        self.steps = math.ceil(length / batch_size)
        if length // self.steps < world_size():
            raise Abort(f"{length} images in batches of {batch_size} leave some of the "
                        f"{world_size()} processes without one: raise --batch-size")

    def __len__(self):
        return self.steps

    def batch_images(self, step):
        """Images of batch number `step` over all processes."""
        return self.length // self.steps + (step < self.length % self.steps)

    def __iter__(self):
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        for batch in order.tensor_split(self.steps):
            yield (self.epoch * self.length + batch.tensor_split(world_size())[rank()]).tolist()


def _start_worker(worker):
    # Ctrl-C and torchrun signal whole process groups. The step under way still needs its images:
    # leave the group, and die of SIGTERM again (the handler is inherited from the parent).
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = lambda *error: None  # the loop is told what fails, but for a lost connection
    if _lock:
        os.close(_lock)  # it is the parent's: gone when the parent is


class Loader(DataLoader):
    """A DataLoader that looks for dead workers once all are started: torch complains of them in a
    signal handler, and what is raised there amid a fork is lost."""

    def __iter__(self):
        if self.num_workers == 0 or self._iterator is not None:
            return super().__iter__()  # starts none
        others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        if callable(handler):  # torch's, but for the first loader
            signal.signal(signal.SIGCHLD, lambda number, frame: None)
        try:
            batches = super().__iter__()
        finally:
            if callable(handler):
                signal.signal(signal.SIGCHLD, handler)
        if len(multiprocessing.active_children()) < len(others) + self.num_workers:
            raise RuntimeError("DataLoader workers died while others were started")
        return batches


def make_loader(dataset, workers, **keywords):
    return Loader(dataset, num_workers=workers, worker_init_fn=_start_worker,
                  pin_memory=torch.cuda.is_available(),
                  timeout=WORKER_TIMEOUT if workers else 0,
                  generator=torch.Generator(),  # its own: the loop's random numbers stay put
                  **keywords)


def train_loader(dataset, args):
    """Batches of this process's share; set loader.batch_sampler.epoch before each pass."""
    workers = 0 if isinstance(dataset, Shapes) else args.workers  # faster drawn than sent
    sampler = ShardedBatches(len(dataset), args.batch_size, args.seed)
    return make_loader(dataset, workers, batch_sampler=sampler, persistent_workers=workers > 0)


def val_loader(dataset, args):
    """This process's share of the validation images: every world_size-th, none twice."""
    workers = 0 if isinstance(dataset, Shapes) else args.workers
    share = Subset(dataset, range(rank(), len(dataset), world_size()))
    return make_loader(share, workers, batch_size=min(256, args.micro_batch))


# ------------------------------------------------------------------ recipe


def set_precision(args, device):
    """(autocast, scaler) for --amp: `with autocast():` around forward passes, a GradScaler."""
    args.amp = args.amp or default_amp(device)
    if device.type == "cuda" and args.amp != "off":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    torch.backends.cudnn.allow_tf32 = args.amp != "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[args.amp]
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=args.amp != "off")
    return autocast, torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")


def default_amp(device):
    """bf16 where the device multiplies it natively, else off."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text() if cpuinfo.exists() else ""
        native = "avx512_bf16" in flags or "amx_bf16" in flags
    return "bf16" if native else "off"


def parameter_groups(module, weight_decay):
    """AdamW groups: no weight decay on biases, norms, scales, tokens and position embeddings."""
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in module.named_parameters():
        exempt = parameter.ndim <= 1 or name.endswith(("_token", "pos_embed", "pos_weight"))
        groups[exempt]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def learning_rate(step, args, steps_per_epoch):
    """Linear from (almost) 0 to lr over the warm-up, then cosine to min_lr; step: from 0 on."""
    warmup = args.warmup_epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (args.epochs * steps_per_epoch - warmup)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class Epoch:
    """One epoch: hands out its batches, updates the weights, keeps the books for log.jsonl.

        books = Epoch(loader, epoch, args, device)
        for images, target, parts in books.batches():
            for part, weight, last in parts:      # micro-batches
                ... losses = {"name": scalar}; (weight * sum of losses).backward()
                books.add(losses, weight)
            books.optimizer_step(optimizer, scaler)

    `weight` is the micro-batch's share of the whole batch times the number of processes, so that
    gradients added up here and averaged by DistributedDataParallel are the whole batch's mean,
    however it was divided.
    """

    bad_steps_in_a_row = 0  # over epochs, too

    def __init__(self, loader, epoch, args, device):
        self.loader, self.epoch, self.args, self.device = loader, epoch, args, device
        self.step, self.images, self.unreadable, self.skipped, self.waited = 0, 0, 0, 0, 0.0
        self.sums, self.step_losses = {}, {}
        self.started = time.perf_counter()

    def batches(self):
        self.bar = tqdm(total=DRY_RUN_STEPS if self.args.dry_run else len(self.loader),
                        disable=None if rank() == 0 else True, leave=False,
                        desc=f"epoch {self.epoch + 1}/{self.args.epochs}")
        source = self._dry_run_source() if self.args.dry_run else self._source(self.epoch)
        with self.bar:
            for step, images, target, unreadable in source:
                self.images += len(images)
                self.unreadable += int(unreadable.sum())
                n, m = len(images), self.args.micro_batch
                scale = world_size() / self.loader.batch_sampler.batch_images(step)
                parts = [(slice(start, start + m), min(m, n - start) * scale, start + m >= n)
                         for start in range(0, n, m)]
                yield (normalize(images, self.device),
                       target.to(self.device, non_blocking=True), parts)

    def _source(self, epoch):
        self.loader.batch_sampler.epoch = epoch
        mark = time.perf_counter()
        for step, batch in enumerate(self.loader):
            self.waited += time.perf_counter() - mark
            yield step, *batch
            mark = time.perf_counter()

    def _dry_run_source(self):
        """5 steps to warm up; then, once the loader's queue is used up, so that a loader which
        cannot keep pace shows, the 15 that are timed. Short epochs follow each other."""
        endless = (batch for epoch in itertools.count() for batch in self._source(epoch))
        yield from itertools.islice(endless, 5)
        for _ in range(self.loader.num_workers * 2):
            next(endless)
        self.waited, began = 0.0, time.perf_counter()
        yield from itertools.islice(endless, DRY_RUN_STEPS - 5)
        self.timed_seconds = time.perf_counter() - began

    def add(self, losses, weight):
        for name, loss in losses.items():
            share = loss.detach().float() * weight
            self.step_losses[name] = self.step_losses.get(name, 0) + share

    def optimizer_step(self, optimizer, scaler):
        """Clip and step, unless a loss was not finite on any rank (ten such in a row are an
        error): all ranks agree on that, and on stopping for a signal, too. Returns whether the
        step was skipped."""
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.clip_grad or math.inf)
        good, fits = sum(self.step_losses.values()).isfinite(), norm.isfinite()
        # fp16: where gradients don't fit the scaler halves its scale, which in the end is 1.
        bad = ~good | ~fits & (scaler.get_scale() <= 1)
        signal_number = torch.full((), _signal, device=self.device)  # torch.tensor would wait
        flags = torch.stack([~(good & fits), bad, signal_number])
        all_reduce_(flags, dist.ReduceOp.MAX)
        skip, bad, number = flags.tolist()
        if not self.bar.disable:
            self.bar.set_postfix({n: f"{float(v):.3g}" for n, v in self.step_losses.items()},
                                 refresh=False)
        if not skip:
            scaler.step(optimizer)
            for name, loss in self.step_losses.items():
                self.sums[name] = self.sums.get(name, 0) + loss
        scaler.update()
        optimizer.zero_grad()
        self.bar.update()
        self.step += 1
        self.step_losses = {}
        self.skipped += skip
        Epoch.bad_steps_in_a_row = Epoch.bad_steps_in_a_row + 1 if bad else 0
        last = Path(self.args.out) / "last.pth"
        kept = f"{last} keeps epoch {self.epoch}" if self.epoch else "no epoch was finished"
        where = f"in epoch {self.epoch + 1} of {self.args.epochs}, step {self.step}"
        if number:
            stop(number, f"{where}; {kept}" + ("; --resume goes on" if self.epoch else ""))
        if Epoch.bad_steps_in_a_row == 10:
            raise Abort(f"the loss was not finite ten steps in a row, {where}; {kept}; try a lower "
                        f"--lr or --amp off", 1)
        return skip

    def record(self):
        """The epoch's line for log.jsonl: losses (mean of steps and ranks), speed, memory."""
        seconds = time.perf_counter() - self.started
        names = list(self.sums)
        sums = all_reduce([float(self.sums[n]) for n in names]
                          + [self.images, self.unreadable], self.device)
        images, unreadable = map(int, sums[-2:])
        if unreadable > 0.01 * images:
            raise Abort(f"{unreadable} of {images} images were unreadable in epoch "
                        f"{self.epoch + 1}, more than 1 %: mend {self.args.data}", 1)
        steps = world_size() * max(1, self.step - self.skipped)
        memory, waited = all_reduce([peak_memory_gb(self.device), self.waited],
                                    self.device, dist.ReduceOp.MAX)
        return {"epoch": self.epoch + 1,
                **{name: total / steps for name, total in zip(names, sums)},
                "images_per_second": images / seconds, "data_wait": waited / seconds,
                "peak_memory_gb": memory, "unreadable": unreadable,
                "skipped_steps": self.skipped, "seconds": seconds}


def peak_memory_gb(device):
    """Most memory this process ever held, in GiB: of the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@torch.inference_mode()
def evaluate(model, loader, device, autocast, max_batches=None):
    """{"top1": percent, "top5": percent} over the validation images of all processes, each once;
    unreadable ones are left out."""
    model.eval()
    top1 = top5 = count = unreadable = 0
    for images, target, skipped in itertools.islice(loader, max_batches):
        if _signal:
            break
        with autocast():
            logits = model(normalize(images, device)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices.cpu() == target[:, None]
        hits, unreadable = hits[skipped == 0], unreadable + int((skipped > 0).sum())
        top1, top5, count = top1 + int(hits[:, 0].sum()), top5 + int(hits.sum()), count + len(hits)
    stop_together(device, "while evaluating; OUT/last.pth keeps the last epoch finished, if any "
                  "was")
    top1, top5, count, unreadable = all_reduce([top1, top5, count, unreadable], device)
    if unreadable > 0.01 * count:
        raise Abort(f"{unreadable:.0f} validation images are unreadable, more than 1 %", 1)
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count}


# ------------------------------------------------------------------ checkpoints and logs


def save_checkpoint(path, **state):
    """torch.save(state) to `path`, whole or not at all."""
    write_whole(path, lambda file: torch.save(state, file))


def write_whole(path, write):
    """write(file) to `path` so that whatever happens, `path` is either the old file or the whole
    new one: temporary file in the same folder, flush, fsync, rename. Raises Abort."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems cannot do that
            os.fsync(folder)  # the renaming, too
        os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):  # torch.save's: RuntimeError
            raise
        raise Abort(f"cannot write {path} ({str(error).splitlines()[0]}): is the disk full? What "
                    f"was there before is still whole", 1, alone=True)


def write_json(path, record):
    write_whole(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


def load_checkpoint(path):
    """What torch.save wrote to `path`, tensors on the CPU. Runs no code from the file.

    Raises Abort if the file is missing, damaged (also by a flipped bit: torch.load itself does not
    compare checksums), or holds anything but tensors and plain values.
    Let through is what training checkpoints of DINO, iBOT and Mugs carry: an argparse.Namespace,
    and numpy numbers (under numpy 1's and 2's names) as learning rates.
    """
    number = np.float64(0).__reduce__()[0]
    allowed = [argparse.Namespace, np.dtype, type(np.dtype("float64")),
               (number, "numpy.core.multiarray.scalar"), (number, "numpy._core.multiarray.scalar")]
    try:
        if zipfile.is_zipfile(path):  # all but files of torch before 1.6
            with zipfile.ZipFile(path) as file:
                broken = file.testzip()
            if broken:
                raise OSError(f"{broken} does not fit its checksum")
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Abort(f"no file {path}")
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise Abort(f"{path} is not a weights file, or holds code, which is never run"
                    + (f" ({reason.split(' was ')[0].strip()})" if reason else ""))
    except Exception as error:  # noqa: BLE001 - zip, pickle and storage readers raise their own
        raise Abort(f"{path} is damaged or not a weights file "
                    f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")


def load_export(path):
    """The content of a student.pth, {"model", "arch", "script", ...}; Abort if it is none."""
    checkpoint = load_checkpoint(path)
    kinds = {"model": dict, "arch": dict, "script": str}
    if not isinstance(checkpoint, dict) or not all(
            isinstance(checkpoint.get(key), kind) for key, kind in kinds.items()):
        raise Abort(f"{path} is no student.pth of this project; released weights need a name, too: "
                    f"--teacher NAME --teacher-weights FILE (eval_knn.py: --arch NAME)")
    return checkpoint


def mismatches(state, build, arch):
    """What keeps `state` from being the weights of build(**arch), which is made without memory: a
    list of phrases, empty if nothing does."""
    try:
        if (not all(isinstance(v, int) and 0 <= v < 2**20 for v in arch.values())
                or arch["dim"] % arch["num_heads"] or arch["depth"] > 1000):
            raise ValueError(f"{arch}")
        with torch.device("meta"):
            expected = build(**arch).state_dict()
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        return [f"what it says of itself is no model ({str(error).splitlines()[0][:200]})"]
    return unlike(state, expected)


def unlike(state, expected):
    """What keeps `state` from being weights like `expected` (both {name: tensor}): phrases."""
    groups = {"missing": sorted(expected.keys() - state.keys()),
              "unexpected": sorted(map(str, state.keys() - expected.keys())),
              "of another shape": [], "of another type": [], "NaN or infinite": []}
    for name, want in expected.items():
        have = state.get(name, want)
        if not torch.is_tensor(have) or have.is_floating_point() != want.is_floating_point():
            groups["of another type"].append(name)
        elif have.shape != want.shape:
            groups["of another shape"].append(f"{name} {tuple(have.shape)} for "
                                              f"{tuple(want.shape)}")
        elif name in state and not have.isfinite().all():
            groups["NaN or infinite"].append(name)
    return [f"{len(names)} {what}: {', '.join(names[:5])}"
            for what, names in groups.items() if names]


_lock = None  # file descriptor of --out, locked against other runs


def occupy(folder):
    """Make the folder of --out and lock it. Raises Abort if that cannot be, or if another run, say
    the one that this one is to replace, still writes there."""
    global _lock
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _lock:
            os.close(_lock)
        _lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # NFS: must be writable
    except OSError as error:
        raise Abort(f"cannot write to --out {folder}: {error}")
    try:
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Abort(f"another run writes to --out {folder}: wait for its end, or stop it")
    except OSError:
        pass  # a file system that knows no locks


def checksum(module):
    """CRC-32 of a module's weights and buffers, but for position embeddings, which were perhaps
    resized, and rounded as this machine does."""
    crc = 0
    for name, value in module.state_dict().items():
        if not name.endswith("pos_embed"):
            crc = zlib.crc32(value.cpu().numpy().tobytes(), crc)
    return crc


def open_run(args):
    """Make or check --out. Returns last.pth's content if the run goes on from it, else None. From
    now on signals let the step under way finish."""
    hold_signals()
    require_same(args.images, "the processes do not have the same images in --data and --val")
    first = on_rank_zero(lambda: comparable(args))
    require_same(changes(first, args), "the processes' settings differ from the first one's")
    if args.dry_run:
        return None
    out, checkpoint = Path(args.out), None
    last, log = out / "last.pth", out / "log.jsonl"
    elsewhere = f"--out {out} is not the same folder for all processes: they must share it; "
    require_same(last.exists(), elsewhere + "is there a last.pth, by process")
    if last.exists() and not args.resume:
        raise Abort(f"{out} already holds a run: --resume goes on with it, --out takes another")
    if last.exists() or args.resume != "yes":
        on_rank_zero(lambda: occupy(out))
    if last.exists() or args.resume == "yes":
        checkpoint = load_checkpoint(last)
        if not isinstance(checkpoint, dict) or "args" not in checkpoint:
            raise Abort(f"{last} is no checkpoint to resume from")
        changed = changes(checkpoint["args"], args)
        if changed:
            raise Abort(f"{last} is of a run with other settings: {changed}")
        if checkpoint["epoch"] == args.epochs:
            say(f"{last} is of a finished run: nothing is left to do")
    require_same(checkpoint and checkpoint["epoch"], elsewhere + "epochs finished, by process")

    def prepare():  # all have looked before rank 0 writes
        try:
            for stray in out.glob("*.tmp"):  # of a run that was killed while writing
                stray.unlink()
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        except OSError as error:
            raise Abort(f"cannot write to --out {out}: {error}")
        if len(lines) > 1 and not checkpoint:
            raise Abort(f"{log} is of {len(lines)} epochs, but there is no {last}: take another "
                        f"--out, or delete that file to start anew")
        settings = {**vars(args), "processes": world_size(), "torch": torch.__version__}
        write_json(out / "args.json", settings)
        # A run killed between its log line and its checkpoint does that epoch again. What a power
        # loss damaged is behind the lines of finished epochs, too.
        kept = lines[:checkpoint["epoch"] if checkpoint else 0]
        write_whole(log, lambda file: file.write("".join(f"{k}\n" for k in kept).encode()))

    on_rank_zero(prepare)
    return checkpoint


def comparable(args):
    """The settings that decide the result, as plain values."""
    return {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}


def changes(then, args):
    """"--lr 0.1 -> 0.2, ...": what differs between comparable() settings and these."""
    now = comparable(args)
    return ", ".join(f"--{name.replace('_', '-')} {then.get(name)} -> {now.get(name)}"
                     for name in sorted(now.keys() | then.keys())
                     if now.get(name) != then.get(name))


def log_epoch(args, record, seconds_left):
    """Append the record to log.jsonl and print it as one line."""
    if rank() == 0:
        try:
            with open(Path(args.out) / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Abort(f"cannot write {args.out}/log.jsonl: {error}", 1, alone=True)
    hidden = {"epoch", "seconds", "data_wait", "peak_memory_gb"}
    hidden |= {name for name in ("unreadable", "skipped_steps") if not record[name]}
    shown = "  ".join(f"{name} {value:.4g}" for name, value in record.items()
                      if name not in hidden and not isinstance(value, list))
    say(f"epoch {record['epoch']}/{args.epochs}  {shown}  {record['seconds']:.0f} s, "
        f"{duration(seconds_left)} left")


def duration(seconds):
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def report_dry_run(args, timed, student, teacher, eval_sets, autocast, prepared):
    """Print what --dry-run measured: speed, memory, waiting for data, hours of the whole run.

    timed: [(an Epoch that was timed, how many epochs of the run are like it), ...]. eval_sets: what
    an evaluation runs over. prepared: seconds from the start to the first step, which the real run
    spends once, too.
    """
    books, images = timed[0][0], len(timed[0][0].loader.dataset)
    steps, device = len(books.loader), books.device

    def evaluation(model):
        return sum(seconds_on(model, val_loader(dataset, args)) for dataset in eval_sets)

    def seconds_on(model, loader):  # of a whole pass, from the first few batches
        few, marks = min(9, len(loader)), [time.perf_counter()]
        for batches in (1, few):
            evaluate(model, loader, device, autocast, batches)
            marks.append(time.perf_counter())
        first, rest = marks[1] - marks[0], marks[2] - marks[1]
        return first + max(0, rest - first) / max(1, few - 1) * (len(loader) - 1)

    whole = prepared + (evaluation(teacher) if teacher else 0) + math.ceil(
        args.epochs / args.eval_every) * evaluation(student)
    for books, epochs in timed:
        step = books.timed_seconds / (DRY_RUN_STEPS - 5)
        whole += epochs * steps * step
        waited, = all_reduce([books.waited / books.timed_seconds], device, dist.ReduceOp.MAX)
        say(f"dry run, {epochs} epochs: {images / steps / step:.1f} images/s, {100 * waited:.0f} % "
            f"of the time waiting for data")
    memory, whole = all_reduce([peak_memory_gb(device), whole], device, dist.ReduceOp.MAX)
    say(f"the whole run, {args.epochs} epochs of {steps} steps: {whole / 3600:.3g} hours "
        f"({duration(whole)}), peak memory {memory:.2f} GiB a process")


# ------------------------------------------------------------------ the command line


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, printed once however many ranks there are."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=functools.partial(
                             argparse.RawDescriptionHelpFormatter, width=100, max_help_position=30))

    def error(self, message):
        raise Abort(f"{message} (see --help)")

    def exit(self, status=0, message=None):
        """The end of --help: at once, for Python needs a second to take torch apart."""
        if "IPython" in sys.modules:
            super().exit(status, message)
        sys.stdout.flush()
        os._exit(status)

    def add_flags(self, title, flags, note=None):
        """flags: (name, default, help[, interval]); a type instead of a default: there is none;
        False: a switch; a list: choices; a tuple: the flag alone means its first value. interval,
        e.g. "(0, 1]": the values that are allowed."""
        group = self.add_argument_group(title, note)
        for name, default, text, *interval in flags:
            kind = default if isinstance(default, type) else type(default)
            convert = functools.partial(number_in, interval[0], kind) if interval else kind
            if default is False:
                group.add_argument(name, action="store_true", help=text)
            elif isinstance(default, list):
                group.add_argument(name, choices=default, help=text)
            elif isinstance(default, tuple):
                group.add_argument(name, nargs="?", const=default[0], choices=default, help=text,
                                   metavar=default[1])
            elif default is kind:
                group.add_argument(name, type=convert, help=text, metavar=kind.__name__.upper())
            else:
                group.add_argument(name, type=convert, help=f"{text} (default: {default})",
                                   default=default, metavar=kind.__name__.upper())
        return group


def number_in(interval, kind, text):
    """argparse's type for a number in an interval such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number of type {kind.__name__}")
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise argparse.ArgumentTypeError(f"{text} is not in {interval}")
    return value


def data_flags(image_size=224, note=""):
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpus //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return [
        ("--data", "data/imagenet", "folder of {train,val}/CLASS/*, or cifar10, cifar100, shapes"),
        ("--data-root", "data", "where cifar10 and cifar100 are downloaded to"),
        ("--val", str, "other validation images: a folder of CLASS/* (default: val/ of --data)"),
        ("--data-fraction", 1.0, "part of each class's training images to use; they are nested",
         "(0, 1]"),
        ("--image-size", image_size, f"pixels a side{note}", "[1, inf)"),
        ("--workers", max(1, min(16, cpus)), "processes that read images, for each process",
         "[0, inf)")]


def recipe_flags(batch_size, epochs, min_lr, weight_decay, clip_grad):
    return [
        ("--batch-size", batch_size, "images per step over all processes (batches are evened out)",
         "[1, inf)"),
        ("--micro-batch", int, "images per forward pass and process (default: all of its share)",
         "[1, inf)"),
        ("--epochs", epochs, "passes over the training images", "[1, inf)"),
        ("--lr", float, "peak learning rate (default: see above)", "(0, inf)"),
        ("--min-lr", min_lr, "learning rate the cosine ends at", "[0, inf)"),
        ("--warmup-epochs", float, "epochs of linear warm-up from 0 (default: see above)",
         "[0, inf)"),
        ("--weight-decay", weight_decay, "none on biases, norms, tokens, position embedding",
         "[0, inf)"),
        ("--clip-grad", clip_grad, "largest gradient norm, 0: no clipping", "[0, inf)"),
        ("--seed", 0, "of weights, data order and augmentation", "[0, inf)")]


def run_flags(eval_every=1):
    return [
        ("--amp", ["bf16", "fp16", "off"], "default: bf16 where the device is fast at it"),
        ("--compile", False, "torch.compile student and teacher"),
        ("--out", str, "where the results go (default: out/SCRIPT-STUDENT-TEACHER)"),
        ("--resume", ("yes", "auto"),
         "go on from OUT/last.pth; --resume auto: start if there is none"),
        ("--eval-every", eval_every, "epochs between evaluations", "[1, inf)"),
        ("--dry-run", False, "20 steps, then: images/s, memory, hours of the run; writes nothing"),
        ("--demo", False, "a whole distillation in minutes, nothing needed (heeds --seed, --amp)")]


def check_flags(args):
    """Raise Abort where flags contradict each other."""
    if args.warmup_epochs >= args.epochs:
        raise Abort(f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs "
                    f"{args.epochs}")
    share, rest = divmod(args.batch_size, world_size())
    if rest:
        raise Abort(f"--batch-size {args.batch_size} is not divisible by the {world_size()} "
                    f"processes: take {max(1, share) * world_size()}")
    args.micro_batch = args.micro_batch or share
    if share % args.micro_batch:
        raise Abort(f"--micro-batch {args.micro_batch} does not divide the {share} images that a "
                    f"process has of each batch")
    patches = max(1, args.image_size // args.patch_size)
    if args.image_size % args.patch_size:
        raise Abort(f"--image-size {args.image_size} is not a multiple of --patch-size "
                    f"{args.patch_size}: take {patches * args.patch_size} or "
                    f"{(patches + 1) * args.patch_size}")

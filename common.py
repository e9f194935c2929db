"""What all scripts share: processes, images, other people's weights, precision, checkpoints, log.

Nothing here belongs to a paper.
"""

import argparse
import datetime
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import sys
import time
import urllib.parse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import distributed as dist
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

# Mean and standard deviation of ImageNet's colours, for every data set: released teachers expect
# images that are normalised by them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# torchrun tells each process its number on this machine, and how many processes run there.
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_cpus():
    """Return how many CPUs this process may use. Slurm or taskset may allow only some of them."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Data workers of each process. Each keeps two batches of float32 in memory: with more of them a
# single process on a large machine would fill it.
WORKERS = min(24, max(1, available_cpus() // LOCAL_WORLD_SIZE))


class InputError(ValueError):
    """Wrong input. main() prints it as one line. Any other exception is a bug: full traceback."""


# ------------------------------------------------------------------ processes


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_processes():
    """Join torchrun's other processes, if there are any. Return the device of this process."""
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", LOCAL_RANK)
        backend = "nccl"
        if LOCAL_WORLD_SIZE > torch.cuda.device_count():
            fail(f"--nproc_per_node {LOCAL_WORLD_SIZE} is more than the number of GPUs, "
                 f"{torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        # Training batches have one size: time cuDNN's kernels in the first step, take the fastest
        torch.backends.cudnn.benchmark = True
        # float32 means float32: by default torch computes convolutions in TF32, linear layers not
        torch.backends.cudnn.allow_tf32 = False
    if "RANK" in os.environ and not dist.is_initialized():
        # An hour: processes wait for a download, and for the last images of --synthesize
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1),
                                device_id=device if backend == "nccl" else None)
    return device


def leave_processes():
    """Leave torchrun's group, if there is one."""
    if dist.is_initialized():
        # On CPUs torch 2.6 can deadlock in the next line: it holds Python's lock (GIL), and a
        # thread of gloo needs this lock to free the last sum's tensor. Sleeping releases the lock.
        # A barrier does not help.
        time.sleep(0.1)
        dist.destroy_process_group()


def first_on_each_machine(download):
    """Call download() in one process of each machine. The others wait until it is done."""
    if LOCAL_RANK == 0:
        download()
    if world_size() > 1:
        dist.barrier()


def sum_over_processes(values, device):
    """Sum a list of numbers elementwise over all processes."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(values)
    return values.tolist()


def mean_over_processes(sums, steps, device):
    """Turn a process's sums over steps, {name: sum}, into means over steps and processes."""
    totals = sum_over_processes([float(total) for total in sums.values()], device)
    return {name: total / (steps * world_size()) for name, total in zip(sums, totals)}


def seed_of(*numbers):
    """Make one seed from several integers, for example (seed, epoch, rank).

    Python's hash of integers is the same in every process and run. Only strings are salted.
    """
    return hash(numbers)


def print0(text):
    """Print in the first process only."""
    if rank() == 0:
        with tqdm.external_write_mode():  # above the progress bar, if there is one
            print(text, flush=True)


def fail(problem):
    """End the program with one line on stderr and exit status 1."""
    if LOCAL_RANK > 0:
        # Wrong input is wrong in all processes. The first one reports it, then torchrun ends the
        # others, which still sleep here.
        time.sleep(20)
    # An error of a data worker arrives with the worker's traceback in front of its message
    message = str(problem).rpartition("InputError: ")[2]
    one_line = " ".join(message.split())
    sys.exit(f"{Path(sys.argv[0]).name}: error: {one_line}")


# ------------------------------------------------------------------ types of flags


def in_range(number, low, high):
    if not low <= number <= high:  # nan is never in a range
        raise argparse.ArgumentTypeError(f"{number} is not between {low:g} and {high:g}")
    return number


def positive_int(text):
    return in_range(int(text), 1, 1e9)


def non_negative_int(text):
    return in_range(int(text), 0, 1e9)


def non_negative(text):
    return in_range(float(text), 0, 1e9)


def fraction(text):
    return in_range(float(text), 0, 1)


def refuse_empty_flags(args):
    """End the program if a flag has an empty value, as --init "$FILE" has if FILE is not set."""
    for name, value in vars(args).items():
        if value == "":
            fail(f"--{name.replace('_', '-')} is empty")


# ------------------------------------------------------------------ images

# Endings of the files that Pillow decodes. Some other types it can only recognise.
Image.init()
DECODED = set(Image.OPEN) - {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in DECODED}


def load_image(path):
    """Return an upright RGB image of 8 bits. Raises OSError, which names the file and the reason.

    Grey values of 16 bits are scaled from 0 .. 65535 to 0 .. 255. The scale is the same for all
    images, so that a dark image stays dark.
    """
    try:
        # An open file, not its path: given a path, Pillow maps uncompressed TIFFs into memory and
        # turns them wrongly
        with open(path, "rb") as file, Image.open(file) as image:
            # Phones save a photo as it came from the sensor, and note in EXIF how to turn it
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F":
                raise ValueError("floats have no range that maps to 8 bits: convert it first")
            if image.mode == "I" or image.mode.startswith("I;16"):
                # convert("RGB") would clip these at 255: nearly all white
                grey = np.asarray(image).astype(np.int64)
                if grey.min() < 0 or grey.max() > 65535:
                    raise ValueError("it has more than 16 bits: convert it first")
                image = Image.fromarray((grey / 257).round().astype(np.uint8))
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise OSError(f"unreadable image {path}: it is not an image that Pillow knows") from error
    except Exception as error:  # image decoders raise many kinds
        raise OSError(f"unreadable image {path}: {error}") from error


class RandAugment(v2.RandAugment):
    """torchvision's RandAugment with operations closer to those of DeiT's recipe.

    There is no Identity, there is Invert, and Posterize leaves 4 to 0 bits instead of 8 to 4. The
    recipe's SolarizeAdd is missing here.
    """

    _AUGMENTATION_SPACE = {  # name: (function that gives a magnitude for each bin, is it signed?)
        **v2.RandAugment._AUGMENTATION_SPACE,
        "Invert": (lambda num_bins, height, width: None, False),  # has no magnitude
        "Posterize": (lambda num_bins, height, width: torch.linspace(4, 0, num_bins).ceil(), False),
    }
    del _AUGMENTATION_SPACE["Identity"]


def train_transform(image_size, scale=(0.08, 1.0), rand_augment=0, random_erasing=0.0):
    """Return the training transform: image -> normalised float tensor (3, S, S).

    rand_augment: magnitude of RandAugment, 0 (off) to 10. Two operations are drawn, and each is
    applied with probability 0.5.
    """
    steps = [
        v2.PILToTensor(),
        v2.RandomResizedCrop(image_size, scale, interpolation=InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
    ]
    if rand_augment:
        one_operation = RandAugment(
            num_ops=1,
            magnitude=rand_augment,
            num_magnitude_bins=11,  # magnitudes 0, 1, ..., 10
            interpolation=InterpolationMode.BILINEAR,
            fill=[round(255 * channel) for channel in MEAN],
        )
        steps.append(v2.RandomApply([one_operation], p=0.5))
        steps.append(v2.RandomApply([one_operation], p=0.5))
    steps += [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
        v2.RandomErasing(random_erasing, value="random"),  # noise, drawn for each pixel
    ]
    return v2.Compose(steps)


def val_transform(image_size):
    """Return the test transform: short side to 256/224 of S, centre crop of S, normalise."""
    return v2.Compose([
        v2.PILToTensor(),
        v2.Resize(round(image_size * 256 / 224), InterpolationMode.BICUBIC),
        v2.CenterCrop(image_size),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ])


# ------------------------------------------------------------------ data sets


class Images(Dataset):
    """The items `indices` of a data set, transformed: (image (3, S, S), label).

    An unreadable image is reported on stderr. In training another image takes its place. With
    replace_unreadable=False, for evaluation, it has the label -1 and is not counted.
    """

    def __init__(self, base, indices, transform, seed=0, replace_unreadable=True):
        self.base = base
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.replace_unreadable = replace_unreadable
        self.epoch = 0
        # The data workers of a process share this memory, also those of later epochs: a bad file is
        # reported once in a process (rarely twice, by workers that meet it at the same moment)
        self.reported = torch.zeros(len(base), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        index = int(self.indices[i])
        # Random numbers depend on (seed, epoch, index) alone. So the number of workers and
        # processes changes no image, and a resumed run sees the images of an uninterrupted one.
        # The global state is put back afterwards, because without workers it is the loop's. The
        # GPU's generator stays as it is.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
            image, label = self.read(index)
            return self.transform(image), label

    def read(self, index):
        for _ in range(100):
            try:
                return self.base[index]
            except OSError as error:
                problem = error
            if not self.reported[index]:
                self.reported[index] = True
                # In one piece with its end, as other workers print at the same time
                sys.stderr.write(f"WARNING: {problem}\n")
            if not self.replace_unreadable:
                return Image.new("RGB", (8, 8)), -1
            # A random image. The next one would be seen twice as often, and after a whole block of
            # unreadable files many times as often.
            index = int(self.indices[torch.randint(len(self), ())])
        raise InputError(f"100 images in a row could not be read, the last because of: {problem}")


class ImageFolder(datasets.ImageFolder):
    """The images below folder/CLASS/, for the given classes. Items are (image, class number).

    Files and folders whose names begin with "." or "@" are left out: macOS puts ._a.jpg beside
    a.jpg, and some file servers keep thumbnails in @eaDir.
    """

    def __init__(self, folder, classes):
        self.folder = str(folder)
        self.given_classes = classes
        unknown_endings = Counter()

        def is_image(path):
            if is_hidden(path[len(self.folder):]):  # the folder itself may lie in a hidden one
                return False
            ending = os.path.splitext(path)[1].lower()
            if ending not in ENDINGS:
                unknown_endings[ending or "(none)"] += 1
            return ending in ENDINGS

        super().__init__(folder, loader=load_image, is_valid_file=is_image, allow_empty=True)
        if unknown_endings:
            print0(f"WARNING: {unknown_endings.total()} files below {folder} are left out, because "
                   f"Pillow opens no files with these endings: {listed(unknown_endings)}")

    def find_classes(self, directory):
        return self.given_classes, {name: i for i, name in enumerate(self.given_classes)}


def is_hidden(path):
    return re.search(r"[/\\][.@]", path) is not None


def class_folders(folder):
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(name for name in names if not is_hidden(f"/{name}"))


class Shapes(Dataset):
    """Flowers with 0, 2, 3, 4 or 5 petals, filled or hollow: ten classes.

    Size, place and colours are random. A flower stands upright and is brighter than its background,
    so that a ViT learns the classes in a minute.
    """

    def __init__(self, length, image_size, seed):
        self.image_size = image_size
        self.seed = seed
        self.classes = [f"{petals} petals, {kind}"
                        for petals in (0, 2, 3, 4, 5) for kind in ("filled", "hollow")]
        self.targets = [index % 10 for index in range(length)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        label = self.targets[index]
        petals = (0, 2, 3, 4, 5)[label // 2]
        hollow = label % 2 == 1
        generator = torch.Generator().manual_seed(seed_of(self.seed, index))
        size, left, top = torch.rand(3, generator=generator).tolist()
        ground, contrast = torch.rand(2, 3, generator=generator)            # (3,) each: colours

        # The edge in polar coordinates: r = size * (1 + 0.4 cos(petals * angle))
        axis = torch.linspace(-1, 1, self.image_size)
        x = axis + 0.25 * (left - 0.5)                                      # (S,)
        y = axis[:, None] + 0.25 * (top - 0.5)                              # (S, 1)
        r = torch.hypot(x, y)                                               # (S, S)
        angle = torch.atan2(y, x)
        edge = (0.45 + 0.2 * size) * (1 + 0.4 * (petals * angle).cos())
        inside = r < edge
        if hollow:
            inside &= r > 0.5 * edge

        # In each channel a background of up to 0.5, and a flower that is brighter by 0.25 to 0.5
        image = 0.5 * ground + (0.25 + 0.25 * contrast) * inside[..., None]  # (S, S, 3)
        return (255 * image).byte().permute(2, 0, 1), label


NAMED_DATA = ("cifar10", "cifar100", "shapes")


def load_data(data, val, image_size):
    """Return (training images, validation images), data sets with .classes and .targets.

    data: a folder that holds train/CLASS/* and val/CLASS/*, or "cifar10", "cifar100", "shapes".
    val: another folder of CLASS/* with the validation images, or None.
    """
    if data in NAMED_DATA and val:
        raise InputError(f"--val {val}: --data {data} has validation images of its own")
    if data == "shapes":
        return Shapes(4000, image_size, seed=4000), Shapes(1000, image_size, seed=1000)
    if data in NAMED_DATA:
        return load_cifar(data)

    train_folder = Path(data) / "train"
    val_folder = Path(val or Path(data) / "val")
    try:
        classes = class_folders(train_folder)
        val_classes = class_folders(val_folder)
    except OSError as error:
        raise InputError(
            f"--data {data}: {error}. It must be a folder that holds train/CLASS/* and val/CLASS/* "
            "(or --val another folder of CLASS/*), or cifar10, cifar100, shapes") from error
    if not classes:
        raise InputError(f"{train_folder} holds no folders: the images of each class need one")
    unknown = sorted(set(val_classes) - set(classes))
    if unknown:
        raise InputError(f"{val_folder} has classes that {train_folder} lacks: {listed(unknown)}")

    train_images = ImageFolder(train_folder, classes)
    val_images = ImageFolder(val_folder, classes)
    filled = set(train_images.targets)
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise InputError(f"{train_folder} has no images of the classes {listed(empty)}: remove "
                         "their folders, or add images")
    if len(val_images) == 0:
        raise InputError(f"{val_folder} has no images of the classes {listed(classes)}")
    return train_images, val_images


def compare_with_training(path, classes, image_size):
    """Print if a student.pth learned other classes than `classes`, or images of another size.

    Both may be intended. path: a file. Of None and of a teacher's name nothing is known. classes:
    their names in order, or None if they do not matter.
    """
    saved = load_checkpoint(path) if path and Path(path).is_file() else None
    trained_on = saved.get("trained_on") if isinstance(saved, dict) else None
    if not isinstance(trained_on, dict):
        return
    learned = trained_on["classes"]
    if classes and learned and learned != classes:
        pairs = itertools.zip_longest(learned, classes, fillvalue="no class")
        for output, (before, here) in enumerate(pairs):
            if before != here:  # one of a thousand perhaps: name the first
                break
        print0(f"WARNING: {path} learned {len(learned)} classes, here are {len(classes)}")
        print0(f"First difference: output {output} was {before}, here it is {here}")
    if trained_on["image_size"] != image_size:
        print0(f"{path} learned from images of {trained_on['image_size']} px, here they have "
               f"{image_size}")


def load_cifar(name):
    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        first_on_each_machine(lambda: cifar("data", download=True))
        return cifar("data", train=True), cifar("data", train=False)
    except (OSError, RuntimeError) as error:
        raise InputError(f"--data {name}: {error}") from error


def print_counts(train_set, val_set):
    """Say what was found, so that a wrong folder is seen before training."""
    classes = train_set.base.classes
    not_validated = len(classes) - len(set(val_set.base.targets))
    remark = f", {not_validated} of them without validation images" if not_validated else ""
    print0(f"{len(train_set)} training and {len(val_set)} validation images of {len(classes)} "
           f"classes{remark}")


def class_balanced_subset(labels, fraction):
    """Return the indices of a fixed random part of each class.

    A larger fraction contains a smaller one, and every class keeps at least one image.
    """
    labels = np.asarray(labels)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = np.random.default_rng([0, label]).permutation(members)
        chosen.append(members[:max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))


def train_loader(dataset, batch_size, accum, workers, seed):
    """Return a loader of this process's part of each batch. batch_size: of all processes together.

    loader.sampler.set_epoch(epoch) shuffles anew. A batch has the same images for any number of
    processes. What is left over after the last whole batch is not used in this epoch.

    The training loop cuts a process's part into `accum` equal chunks: InputError if it cannot.
    """
    num_chunks = world_size() * accum
    if batch_size % num_chunks:
        raise InputError(f"--batch-size {batch_size} is not divisible by processes x --accum = "
                         f"{num_chunks}")
    if batch_size > len(dataset):
        raise InputError(f"--batch-size {batch_size} is more than the {len(dataset)} training "
                         "images: lower it")
    sampler = DistributedSampler(dataset, world_size(), rank(), seed=seed, drop_last=True)
    # No persistent_workers: they would keep the data set of the first epoch, and with it `epoch`,
    # on which augmentation depends
    return DataLoader(dataset, batch_size // world_size(), sampler=sampler, drop_last=True,
                      num_workers=workers, pin_memory=torch.cuda.is_available())


def val_loader(dataset, batch_size, workers):
    """Return a loader that loads each image once, in one process. batch_size: of each process."""
    # DistributedSampler would repeat some images, so that all processes get the same number
    sampler = range(rank(), len(dataset), world_size())
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers,
                      pin_memory=torch.cuda.is_available())


# ------------------------------------------------------------------ other people's weights

# Types that training checkpoints hold besides tensors, such as NumPy's numbers. Loading them runs no
# code. A pair is (type or function, its name in the file): NumPy 2 and Python 3.13 have renamed
# modules, and a Windows path is read as a path of this system.
HARMLESS = [
    argparse.Namespace,
    (type(Path()), "pathlib.PosixPath"),
    (type(Path()), "pathlib.WindowsPath"),
    (type(Path()), "pathlib._local.PosixPath"),  # written by Python 3.13
    (type(Path()), "pathlib._local.WindowsPath"),
    np.ndarray,
    np.dtype,
    *[type(np.dtype(kind)) for kind in "?" + np.typecodes["AllInteger"] + np.typecodes["Float"]],
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.zeros(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.zeros(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
]


def load_checkpoint(path):
    """Return what torch.save wrote to a file or https address, on the CPU.

    Reads .safetensors, too, if the package safetensors is installed. Raises InputError, which says
    why the file cannot be read.
    """
    path = str(path)
    advice = ""
    if path.startswith(("https://", "http://")):
        path = download(path)
        advice = ". Delete it, and it will be downloaded again"
    check_that_it_holds_weights(path)
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        # weights_only: a pickle can run any program when it is read. Such a file is refused.
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise InputError(f"to read {path}: pip install safetensors") from error
    except Exception as error:  # a damaged file raises many kinds
        code = re.search(r"(?:global|GLOBAL):? (?:GLOBAL )?([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise InputError(f"{path} holds code ({code[1]}), which is never run. Save only the "
                             "tensors: torch.save(model.state_dict(), ...)") from error
        reason = str(error).partition(".")[0][:100]
        raise InputError(f"{path} is not a file of weights, or damaged, perhaps half a download "
                         f"({type(error).__name__}: {reason}){advice}") from error


def download(url):
    """Return the path of a downloaded file. torch.hub's folder keeps it for the next time."""
    address = urllib.parse.urlparse(url)
    # The whole address, since many files on the web are called model.safetensors
    path = f"{torch.hub.get_dir()}/checkpoints/{address.hostname}{address.path}"
    folder, name = os.path.split(path)
    if address.query:
        # A folder for each query. In the name it would hide the ending, and may be too long.
        folder += "/" + hashlib.sha256(address.query.encode()).hexdigest()[:16]
        path = f"{folder}/{name}"
    # Hex digits after a "-" are the start of the file's sha256. At least one must be a letter, so
    # that a date is not taken for a hash.
    sha256 = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,})\.", name)

    def fetch():
        if not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, path, sha256 and sha256[1])

    try:
        first_on_each_machine(fetch)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{url} cannot be downloaded: {error}. If you have the file, give its path "
                         "in place of the address, or that of a teacher as --teacher-weights "
                         "(eval_knn.py: --weights)") from error
    return path


def check_that_it_holds_weights(path):
    """Raise InputError for what is often found where a file of weights should be."""
    try:
        with open(path, "rb") as file:
            start = file.read(200).lstrip().lower()
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder: give the file in it") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise InputError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull")
    if start.startswith(b"pk") and b".npy" in start:
        raise InputError(f"{path} is an .npz of NumPy: load it into a model, with timm for "
                         "example, and save that: torch.save(model.state_dict(), ...)")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path} is a web page: the download went wrong")


def read_weights(path, landmark="patch_embed.proj.weight"):
    """Return the weights of one network in somebody's checkpoint: {name: float32 tensor}.

    landmark: a name that each network of the wanted kind has. Whatever stands before it in the
    checkpoint comes from wrappers, and is removed from all names: "state_dict" of a training
    script, "module." of DistributedDataParallel, "_orig_mod." of torch.compile, "backbone." of
    self-supervised training, and so on.

    Of several such networks choose_network takes one.
    """
    tensors = {WRAPPERS.sub("", name): tensor
               for name, tensor in flatten(load_checkpoint(path)).items()}
    prefixes = []
    for name in tensors:
        if name == landmark or name.endswith(f".{landmark}"):
            prefixes.append(name.removesuffix(landmark))
    # A part of a network may have the landmark, too: in a ResNet, layer1.0.conv1.weight ends like
    # conv1.weight. Keep the whole network.
    prefixes = [inner for inner in prefixes
                if not any(inner != outer and inner.startswith(outer) for outer in prefixes)]
    if not prefixes:
        raise InputError(f"{path} holds no network with a {landmark}. Its names are "
                         f"{listed(tensors) or 'none'}")
    prefix = choose_network(prefixes, path)

    weights = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            check_numbers(tensor, name, path)
            # float(): some operations on a CPU refuse the half precision of some files
            weights[name.removeprefix(prefix)] = tensor.detach().float()
    left_out = [name for name in tensors if not name.startswith(prefix)]
    if left_out:
        print0(f"{path}: the weights are those below {prefix[:-1]}; left out: {listed(left_out)}")
    return weights


# Words that torch.compile and others put into names, not only at the start
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def check_numbers(tensor, name, path):
    """Raise InputError if a tensor is quantised, complex, sparse, without data, or not finite."""
    is_scalar = tensor.ndim == 0  # BatchNorm's count of batches is an integer
    if not (tensor.is_floating_point() or is_scalar):
        raise InputError(f"{path} holds {tensor.dtype} in {name}, not floating-point numbers")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"{path} holds a sparse or meta tensor, {name}")
    if not tensor.isfinite().all():
        raise InputError(f"{path} holds NaN or infinite numbers in {name}")


def flatten(tree, prefix=""):
    """Turn nested dictionaries of tensors into one, with names joined by dots."""
    tensors = {}
    if isinstance(tree, dict):
        for key, value in tree.items():
            tensors.update(flatten(value, f"{prefix}{key}."))
    elif isinstance(tree, torch.Tensor):
        tensors[prefix[:-1]] = tree
    return tensors


def choose_network(prefixes, path):
    """Return the prefix of the network to use. Of several this takes, in this order:

      1. a teacher: in self-supervised training it is the moving average of the student;
      2. another moving average (ema);
      3. MoCo v3's base_encoder.
    """
    for word in ("teacher", "ema", "base_encoder"):
        for prefix in prefixes:
            if re.search(rf"(^|[._]){word}", prefix):
                return prefix
    if len(prefixes) > 1:
        names = listed(prefix[:-1] for prefix in prefixes)
        raise InputError(f"{path} holds several networks, below {names}. Save only the one that "
                         "you want")
    return prefixes[0]


def load_strictly(model, weights, source):
    """Load weights into a model if every name and size agrees. Else say which do not."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    other_sizes = [f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
                   for name, tensor in expected.items()
                   if name in weights and weights[name].shape != tensor.shape]
    problems = []
    if missing:
        problems.append(f"lacks {listed(missing)}")
    if unexpected:
        problems.append(f"has unexpected {listed(unexpected)}")
    if other_sizes:
        problems.append(f"has other sizes: {listed(other_sizes)}")
    if problems:
        raise InputError(f"{source} belongs to another model: it {'; it '.join(problems)}")
    model.load_state_dict(weights)


def listed(names):
    """Return the first three names, and the number of all, as text for a message."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# ------------------------------------------------------------------ precision and schedule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def cpu_info():
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""  # Linux alone has it


def best_precision(device):
    """Return the fastest precision with native matrix products: bf16, fp16 or off."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if re.search("avx512_bf16|amx_bf16", cpu_info()) else "off"


def choose_attention_kernel(device, amp):
    """Make F.scaled_dot_product_attention use the kernel that trains fastest on a CPU."""
    if device.type == "cpu":
        # In float32 the fused ("flash") kernel is the fastest. In bf16 its backward pass is slow:
        # there plain matrix products ("math") win, if they need not be in float32. In spite of
        # their names both switches work on CPUs.
        torch.backends.cuda.enable_flash_sdp(amp == "off")
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


def describe_run(device, amp):
    """Print what the run computes on, so that a missing GPU is seen at once."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {torch.cuda.device_count()} GPU(s) here"
    else:
        model = re.search(r"model name\s*:\s*(.*)", cpu_info())
        name = f"CPU: {model[1]}" if model else "CPU"
    print0(f"{name}, {world_size()} process(es), amp {amp}, torch {torch.__version__}")


def parameter_groups(module, weight_decay):
    """Return AdamW's groups: weight decay only for matrices and convolution kernels.

    Biases, scales of norms, tokens and positions get none, as is usual for ViTs.
    """
    decay = []
    no_decay = []
    for name, parameter in module.named_parameters():
        if parameter.ndim <= 1 or name.endswith(("_token", "pos_embed", "pos_weight")):
            no_decay.append(parameter)
        else:
            decay.append(parameter)
    return [{"params": decay, "weight_decay": weight_decay},
            {"params": no_decay, "weight_decay": 0.0}]


def learning_rate(epoch, epochs, lr, min_lr, warmup_epochs):
    """Rise linearly from 0 to lr, then fall as a cosine to min_lr. epoch may be a fraction."""
    warmup_epochs = min(warmup_epochs, epochs / 10)  # a short run is not all warm-up
    min_lr = min(min_lr, lr)
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def moving_average(model, max_decay):
    """Return an AveragedModel. Its .module holds the moving average of the model's weights.

    Call its update_parameters(model) after each step. Then
        average = decay * average + (1 - decay) * weight
    with decay = min(max_decay, (1 + n) / (10 + n)) after n updates. A constant 0.99996 would keep
    92 % of the first, random weights after 2,000 steps. max_decay 0 makes a plain copy.
    """
    def update(averages, weights, _):
        n = int(average.n_averaged)  # on the CPU, so that this does not wait for a GPU
        decay = min(max_decay, (1 + n) / (10 + n))
        get_ema_multi_avg_fn(decay)(averages, weights, n)

    average = AveragedModel(model, multi_avg_fn=update)
    return average


# ------------------------------------------------------------------ evaluation, checkpoints, log


@torch.inference_mode()
def evaluate(model, loader, device, autocast):
    """Return the top-1 accuracy in percent over the images of all processes."""
    model.eval()
    correct = 0
    count = 0
    for images, target in loader:
        with autocast:
            logits = model(images.to(device, non_blocking=True))
        correct += (logits.argmax(1).cpu() == target).sum().item()
        count += (target >= 0).sum().item()  # -1: an unreadable image
    correct, count = sum_over_processes([correct, count], device)
    if count == 0:
        raise InputError("no validation image can be read")
    return 100 * correct / count


def cpu_weights(module):
    """Return a module's state_dict() on the CPU, so that torch.load works on any machine."""
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


def save_checkpoint(path, **state):
    """torch.save(state) to `path`, whole or not at all: a kill leaves the old file as it was."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk, before the name changes
    os.replace(temporary, path)


# Flags that may change when a run is resumed: where files lie, how fast the run is, what it prints
MAY_CHANGE = ("data", "val", "init", "workers", "accum", "compile", "out", "resume", "eval_every",
              "log_every", "demo", "synthesize")


def open_run(out, resume, settings):
    """Make the folder `out`. Return the content of its last.pth to continue from, or None."""
    last = Path(out) / "last.pth"
    checkpoint = None
    if last.exists():
        if not resume:
            raise InputError(f"{out} already holds a run: add --resume, or choose another folder")
        checkpoint = load_checkpoint(last)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("args"), dict):
            raise InputError(f"{last} was not written by these scripts")
        before = checkpoint["args"]
        changed = [f"{name} {settings.get(name)}, before {before.get(name)}"
                   for name in {**before, **settings}
                   if name not in MAY_CHANGE and settings.get(name) != before.get(name)]
        if changed:
            student = last.with_name("student.pth")
            init = f", perhaps with --init {student}" if student.exists() else ""
            raise InputError(f"{last} was written with other settings: {'; '.join(changed)}. For "
                             f"other settings start a new run in another folder{init}")
        if checkpoint["log"]:  # --synthesize logs no epochs
            print0(f"continuing the run in {out}; epochs that are done: {len(checkpoint['log'])}")
    elif resume:
        print0(f"{out} holds no last.pth: this is a new run")
    elif last.with_name("student.pth").exists():
        raise InputError(f"{out} already holds a student.pth, which this run would overwrite: "
                         "choose another folder")
    try:
        if rank() == 0:
            last.parent.mkdir(parents=True, exist_ok=True)
            (last.parent / "args.json").write_text(json.dumps(settings, indent=1))
    except OSError as error:
        raise InputError(f"--out {out}: {error}") from error
    return checkpoint


class TimedBatches:
    """The batches of a loader, for one epoch. Measures how long the loop waits for them.

    On a terminal this also draws a progress bar.
    """

    def __init__(self, loader, epoch, epochs, batch_size):
        self.loader = loader
        self.epoch = epoch
        self.epochs = epochs
        self.batch_size = batch_size
        self.steps = 0
        self.seconds_waiting = 0.0
        self.start = time.perf_counter()

    def __iter__(self):
        disable = None if rank() == 0 else True  # None: on if stderr is a terminal
        bar = tqdm(self.loader, f"epoch {self.epoch + 1}", leave=False, disable=disable)
        asked = time.perf_counter()
        for batch in bar:
            # The loop asks for a batch when its previous step is over. On a GPU, too, all but the
            # optimizer is done: the check for finite gradients waits for them. So in this time
            # next to nothing is computed.
            self.seconds_waiting += time.perf_counter() - asked
            self.steps += 1
            yield batch
            asked = time.perf_counter()

    def seconds(self):
        return time.perf_counter() - self.start

    def speed(self):
        """Return {"images_per_second", "waiting_for_data" as a share of the time}, up to now."""
        seconds = self.seconds()
        return {"images_per_second": self.steps * self.batch_size / seconds,
                "waiting_for_data": self.seconds_waiting / seconds}

    def print_progress(self, loss_sums, lr):
        """Print a line; its loss is the first process's mean over the epoch so far.

        loss_sums: {name: sum of a loss term over the epoch's steps}.
        """
        loss = float(sum(loss_sums.values())) / self.steps
        speed = self.speed()
        steps_left = (self.epochs - self.epoch) * len(self.loader) - self.steps
        seconds_left = steps_left * self.seconds() / self.steps
        print0(f"epoch {self.epoch + 1}/{self.epochs}  step {self.steps}/{len(self.loader)}  "
               f"loss {loss:.4f}  lr {lr:.2e}  {speed['images_per_second']:.0f} images/s  "
               f"waiting for data {speed['waiting_for_data']:.0%}  left {duration(seconds_left)}")


def log_epoch(out, log, epochs):
    """Print the last record of `log` as one line, and write all records to log.jsonl."""
    shown = []
    for name, value in log[-1].items():
        number = f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
        shown.append(f"{name} {number}")
    seconds_left = sum(record["seconds"] for record in log) / len(log) * (epochs - len(log))
    print0("  ".join([*shown, f"left {duration(seconds_left)}"]))
    if rank() == 0:
        lines = [json.dumps(record) + "\n" for record in log]
        (Path(out) / "log.jsonl").write_text("".join(lines))


def duration(seconds):
    return str(datetime.timedelta(seconds=round(seconds)))


def peak_memory_gb():
    """Return the most memory used so far, in GiB: the GPU's, or without a GPU this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource  # Windows has none
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on a Mac, else KiB

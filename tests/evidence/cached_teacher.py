"""Run a method's script, with the outputs of its teacher kept in a folder.

    python tests/evidence/cached_teacher.py FOLDER vitkd.py --flag value ...

Runs that differ in their losses alone show the same images to the same frozen teacher: image order
and augmentation depend on seed and epoch. The first run computes the teacher's outputs, the others
read them. The results are those of the script itself, bit for bit, and a student of CPU size
trains about twice as fast. An output is found by a hash of teacher and images, so runs with other
images cannot read it by mistake. The folder is for one machine: other CPUs round differently. It
grows by about 110 KB for each image that a DeiT-T sees at 112 px (vitkd.py), or 1.5 KB
(attndistill.py). Delete it at the end.
"""

import hashlib
import importlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# What a script's training loop asks its teacher for
OUTPUTS = {"vitkd": "features", "attndistill": "class_token_and_attention", "dearkd": "features"}


def digest(*tensors):
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.contiguous().numpy())
    return hashed.hexdigest()


def cached(compute, name, folder):
    """Return a function images -> compute(images) that reads what an earlier call computed."""
    def read_or_compute(images):
        path = folder / f"{name}-{digest(images)}.pth"
        if path.exists():
            return torch.load(path, weights_only=True)
        outputs = compute(images)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(outputs, unfinished)
        unfinished.replace(path)
        return outputs
    return read_or_compute


def main(folder, script, flags):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def use_cache(method, output):
        load_teacher = method.load_teacher

        def load_cached_teacher(*args, **kwargs):
            teacher = load_teacher(*args, **kwargs)
            name = digest(*teacher.state_dict().values())[:16]
            setattr(teacher, output, cached(getattr(teacher, output), name, folder))
            return teacher
        method.load_teacher = load_cached_teacher

    for name, output in OUTPUTS.items():
        use_cache(importlib.import_module(name), output)
    importlib.import_module(Path(script).stem).main(flags)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

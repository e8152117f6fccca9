"""Methods of adversarial training side by side: which of the published orderings appear in small.

    OMP_NUM_THREADS=1 python scripts/bench/published_ordering.py --data cifar10 --out runs/ordering [--images 5000]

Trains every method with every seed on the first `--images` training images: CNN4 with BatchNorm, SGD, 10 steps of
attack, learning rate divided by 10 at 60 and 80 % of the epochs; the best epoch is chosen on a tenth of the images,
held out. Then attacks best and last weights, as `robust compare` does, on the first `--tests` test images, and prints a
table of means over the seeds in percent. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import robust
from robust.comparison import Line
from robust.comparison_folder import compare_runs
from robust.images import MemoryImages
from robust.settings import Settings
from robust.trainer import train

PGD = "pgd:attack=(pgd:steps=10,step_size=0.25,keep=last,mode=keep),statistics=train,batch_norm=own"
METHODS: dict[str, dict[str, object]] = {
    "pgd": {"objective": PGD},
    "trades": {"objective": "trades"},
    "awp": {"objective": PGD, "weight_perturbation": "awp:gamma=0.01"},
    "sovr": {"objective": "sovr"},
    "dafa": {"objective": "trades", "weightings": ("dafa:warmup_epochs={half}",)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="of which the first images are used")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--tests", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--attack", default="apgd_t:targets=4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    subset = options.out / f"first_{options.images}.npz"
    if not subset.exists():
        write_subset(options.data, options.root, options.images, subset)
    lines = []
    for seed in options.seeds:
        runs = []
        for name in METHODS:
            runs.append(options.out / str(seed) / name)
            train(settings_of(name, subset, options.epochs, seed), runs[-1], progress=False)
        folder = options.out / str(seed) / "comparison"
        lines += compare_runs(runs, [options.attack], folder, limit=options.tests, batch_size=250, progress=False)
        print(table(lines), flush=True)


def write_subset(text: str, root: Path | None, images: int, path: Path) -> None:
    """The first training images and all test images of a data set, as an archive."""
    data = robust.parse_dataset(text)(root)
    train_images = data.train.subset(torch.arange(images))
    assert isinstance(train_images, MemoryImages) and isinstance(data.test, MemoryImages)
    parts = {"train": train_images, "test": data.test}
    arrays = {f"x_{name}": part.pixels.numpy() for name, part in parts.items()}
    arrays |= {f"y_{name}": part.labels.numpy() for name, part in parts.items()}
    np.savez(path, classes=np.array(data.classes), **arrays)


def settings_of(name: str, subset: Path, epochs: int, seed: int) -> Settings:
    """A run; the methods differ in what METHODS says and nothing else."""
    method = {key: _filled(value, epochs) for key, value in METHODS[name].items()}
    return Settings.from_dict(
        {
            "data": f"npz:path={subset},layout=nchw,mean=0.5,std=0.25,flip=true,crop_padding=4,padding_mode=constant",
            "model": "cnn4:hidden=256,batch_norm=true",
            "eps": 8 / 255,
            "epochs": epochs,
            "optimizer": "sgd:lr=0.05",
            "lr_schedule": f"milestones:at={int(0.6 * epochs)}+{int(0.8 * epochs)},factor=0.1",
            "select": "best",
            "seed": seed,
            **method,
        }
    )


def _filled(value: object, epochs: int) -> object:
    texts = value if isinstance(value, tuple) else (value,)
    filled = [str(text).replace("{half}", str(epochs // 2)) for text in texts]
    return filled if isinstance(value, tuple) else filled[0]


def table(lines: list[Line]) -> str:
    """Means over the seeds in Markdown, worst class behind the average, the seeds' values of the attack in brackets."""
    groups: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.run, line.weights].append(line)
    rows = ["| method | weights | clean | worst class | robust | worst class |", "|---|---|---|---|---|---|"]
    for (run, weights), some in groups.items():
        cells = [
            _cell([getattr(one, name) for one in some]) for name in ("clean", "clean_worst", "robust", "robust_worst")
        ]
        rows.append(f"| {run} | {weights} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"


if __name__ == "__main__":
    main()

"""Points that fool a network, stored for training another one against transfer attacks (PubDef).

    python scripts/transfer_points.py CHECKPOINT --out points.npz [--data cifar10] [--attack pgd:steps=10] [--copies 4]
        [--model FILE.py:NAME, for a checkpoint of your own network]
    robust train --data "transferred:points=points.npz,data=(cifar10)" --objective natural

Training images are taken as they are stored, without augmentation; norm and radius are the checkpoint's unless given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import robust
from attacks.attack import ATTACKS
from attacks.registry import number
from attacks.threat import make_ball
from robust.flags import add_own_network
from robust.own_model import own_network
from robust.transfer import stored_points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the public network")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", help="data set (default: the one that the checkpoint was trained on)")
    parser.add_argument("--attack", default="pgd:steps=10,step_size=0.25,keep=last")
    parser.add_argument("--copies", type=int, default=4, help="points of each image")
    add_own_network(parser)
    parser.add_argument("--norm")
    parser.add_argument("--eps", type=number)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    own = None if options.model is None else own_network(options.model)
    checkpoint = robust.load(options.checkpoint, own)
    data = robust.parse_dataset(options.data or checkpoint.settings["data"])(options.root)
    ball = make_ball(options.norm or checkpoint.ball.norm, checkpoint.ball.eps if options.eps is None else options.eps)
    model, attack = checkpoint.model.to(options.device), ATTACKS.parse(options.attack)
    points = stored_points(model, data.train, ball, attack, options.copies, device=options.device)
    np.savez(options.out, points=points.numpy(), attack=options.attack, norm=ball.norm, eps=float(ball.eps))


if __name__ == "__main__":
    main()

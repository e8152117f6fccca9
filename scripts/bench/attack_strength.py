"""How strong the attacks of a training step are: mean loss and share of fooled images on a trained checkpoint.

    python scripts/bench/attack_strength.py CHECKPOINT [--images 2000] [--root DATA]

Compares the point that is returned (best, last) and the arithmetic of the attack (float32, bfloat16). The points are
judged in float32. The network is the checkpoint in evaluation mode, the radius that of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import robust
from attacks.attack import ATTACKS
from certify.tracing import capture
from robust.attacked_layers import layers_for

ATTACKS_COMPARED = [
    f"pgd:steps=8,step_size={step},{decay}unit=box,keep={keep},mode=keep,precision={precision}"
    for step, decay in (("0.5", "decay=0.1,decay_at=0.5+0.8+0.9,"), ("0.25", ""))
    for keep in ("best", "last")
    for precision in ("float32", "bfloat16")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--root", type=Path)
    options = parser.parse_args()
    checkpoint = robust.load(options.checkpoint)
    data = robust.parse_dataset(checkpoint.settings["data"])(options.root)
    x, y = data.train.batch(torch.arange(min(options.images, len(data.train))))
    network = capture(checkpoint.model, x[:1]).snapshot().without_gradient()
    for text in ATTACKS_COMPARED:
        attack = ATTACKS.parse(text)
        generator = torch.Generator().manual_seed(0)
        attacked = network.changed(layers_for(attack.steps, attack.precision, len(x)))
        x_adv = attack(attacked, x, y, checkpoint.ball, generator=generator)
        with torch.no_grad():
            logits = network(x_adv)
        loss = F.cross_entropy(logits, y).item()
        fooled = (logits.argmax(1) != y).double().mean().item()
        print(json.dumps({"attack": text, "loss": round(loss, 5), "fooled": round(fooled, 5)}), flush=True)


if __name__ == "__main__":
    main()

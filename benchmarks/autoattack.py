"""AutoAttack here against pyautoattack's `run_standard_evaluation`: CPU seconds and verdicts.

    python -m benchmarks.autoattack [--images 100] [--queries 5000] [--repeats 3]

Both sides attack the same images of the digits, one thread, interleaved repeats, the standard
version in float32; two models are trained first, one plainly and one against PGD-3. Prints the
ratio of the CPU times (the machine may be shared) and whether the verdicts agree: robust accuracy
within one image in a hundred. Exits 1 where they do not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from pyautoattack import AutoAttack as PlainAutoAttack
from torch.nn import functional as F

from evaluators.autoattack import AutoAttack
from evaluators.base import Batch
from trainables.adversary import attacked, pgd_iterates, random_start
from trainables.data import load_data, to_unit
from trainables.models import Classifier, build_classifier
from trainables.recipe import Recipe
from trainables.scale import DIGITS

# model, epochs, PGD steps while training, radius under attack
CASES = (("resnet18", 6, 0, 16 / 255), ("resnet18", 8, 3, 32 / 255), ("resnet50", 8, 3, 16 / 255))
TRAINING_EPSILON = 16 / 255
BATCH = 64


def main() -> int:
    """Run the comparison; 0 when both sides agree on every model, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    split = load_data(DIGITS).held_out.subset(options.images, seed=0)
    batch = Batch(to_unit(split.images), split.labels, split.ids)
    agreed = [compare(*case, batch, options) for case in CASES]
    return 0 if all(agreed) else 1


def compare(
    model: str, epochs: int, steps: int, epsilon: float, batch: Batch, options: argparse.Namespace
) -> bool:
    """Time both sides on one model, print the line, and say whether they agree."""
    classifier = trained(model, epochs=epochs, attack_steps=steps)
    ours_s, plain_s, survivors, differing = [], [], [], 0
    for seed in range(options.repeats):
        began = time.process_time()
        ours = attacked_here(classifier, batch, epsilon, options.queries, seed)
        between = time.process_time()
        plain = attacked_plainly(classifier, batch, epsilon, options.queries, seed)
        plain_s.append(time.process_time() - between)
        ours_s.append(between - began)
        survivors.append((sum(ours), sum(plain)))
        differing = max(differing, sum(a != b for a, b in zip(ours, plain, strict=True)))
    ratios = [p / o for p, o in zip(plain_s, ours_s, strict=True)]
    agree = all(abs(a - b) <= max(1, len(batch.ids) // 100) for a, b in survivors)
    print(
        f"{model}, {'PGD-' + str(steps) if steps else 'clean'} training, "
        f"epsilon {255 * epsilon:g}/255, n={len(batch.ids)}, {options.queries} queries: "
        f"here {statistics.median(ours_s):.1f} s, plainly {statistics.median(plain_s):.1f} s, "
        f"ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f}); "
        f"survivors here and plainly {survivors}, differing images at most {differing}: "
        f"{'agree' if agree else 'DISAGREE'}",
        flush=True,
    )
    return agree


def attacked_here(
    classifier: Classifier, batch: Batch, epsilon: float, queries: int, seed: int
) -> list[bool]:
    """Return which images survive this project's AutoAttack."""
    evaluator = AutoAttack(DIGITS, radii={"autoattack": epsilon}, square_queries=queries)
    generator = torch.Generator().manual_seed(seed)
    ledger = evaluator.judge(classifier, batch, generator=generator)
    survived: list[bool] = ledger["survived"].to_pylist()
    return survived


def attacked_plainly(
    classifier: Classifier, batch: Batch, epsilon: float, queries: int, seed: int
) -> list[bool]:
    """Return which images survive pyautoattack, called the ordinary way."""
    attack = PlainAutoAttack(classifier, eps=epsilon, seed=seed, version="standard")
    attack.square.n_queries = queries
    _, answers = attack.run_standard_evaluation(batch.images.contiguous(), batch.labels)
    survived: list[bool] = (answers == batch.labels).tolist()
    return survived


def trained(model: str, *, epochs: int, attack_steps: int) -> Classifier:
    """Train a model on the digits, on PGD iterates where `attack_steps` is not 0."""
    recipe = Recipe(
        scale=DIGITS.name,
        model=model,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=1e-4,
        scheduler="cosine",
        epochs=epochs,
        batch_size=BATCH,
    )
    classifier = build_classifier(recipe)
    split = load_data(DIGITS).train
    steps = epochs * (len(split) // BATCH)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(split), (BATCH,), generator=generator)
        images, labels = to_unit(split.images[chosen]), split.labels[chosen]
        if attack_steps:
            images = perturbed(classifier, images, labels, attack_steps, generator)
        classifier.train()
        optimizer.zero_grad()
        F.cross_entropy(classifier(images), labels).backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def perturbed(
    classifier: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the last iterate of PGD from a random start."""
    with attacked(classifier):
        ((_, iterate),) = pgd_iterates(
            classifier,
            images,
            labels,
            epsilon=TRAINING_EPSILON,
            step_size=TRAINING_EPSILON / 2,
            stops=(steps,),
            start_BCHW=random_start(images, epsilon=TRAINING_EPSILON, generator=generator),
        )
    return iterate


if __name__ == "__main__":
    sys.exit(main())

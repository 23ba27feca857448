"""A training as its logger tells it, and the words of a picture."""

from __future__ import annotations

import math
from typing import Any

from tests.figures import words_of

PARTS = ("ln_1", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "ln_2", "mlp.fc1", "mlp.fc2", "gate")
FIVE = ["conv1", "bn1", "conv2", "bn2", "a_classifier_head_with_quite_a_long_name"]
TRANSFORMER = [f"model.encoder.layers.{layer}.{part}" for layer in range(33) for part in PARTS]
MANY = ["model.embeddings.tokens", "model.embeddings.positions", *TRANSFORMER, "model.norm", "model.head"]
FLAT = [f"layer_{number}" for number in range(300)]


def history_of(names: list[str], steps: int = 40) -> dict[str, tuple[list[int], list[float]]]:
    """Norms that grow by a rate of their own, lambda on a ramp, and the rest that goes with it."""
    at = [10 * step + 9 for step in range(steps)]
    history = {}
    for index, name in enumerate(names):
        rate = math.sin(index + 1.0)
        history[f"l2_norm/{name}"] = at, [(index % 7 + 1) * math.exp(rate * step / steps) for step in range(steps)]
        history[f"update_ratio/{name}"] = at, [1e-3 * (index % 5 + 1) / (step + 1) for step in range(steps)]
    history["l2_norm/total"] = at, [10.0] * steps
    for group, base in {"decay": 0.1, "no_decay": 0.0, "head": 0.2}.items():
        history[f"weight_decay/{group}"] = at, [base * step for step in range(steps)]
        history[f"l2_penalty/{group}"] = at, [base * step * 5 for step in range(steps)]
        history[f"lr-AdamW/{group}"] = at, [0.01] * steps
    history["l2_penalty/total"] = at, [1.5 * step for step in range(steps)]
    history["train_loss"] = at, [2.0] * steps
    return history


def in_words(figure: Any) -> str:
    return "\n".join(text.get_text() for text in words_of(figure))

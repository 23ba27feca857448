"""Named lists of rules: the default one and those for common architectures."""

from __future__ import annotations

from dataclasses import replace

from lightning_l2.rules.rule import DecayRule

_NO_DECAY = DecayRule("no_decay", default_exemptions=True, weight_decay=0.0, optional=True)
_DECAY = DecayRule("decay", optional=True)
_REST_NO_DECAY = DecayRule("rest_no_decay", weight_decay=0.0, optional=True)
_KERNELS = ("Linear", "Bilinear", "_ConvNd", "Conv1D")
_POSITIONS = (
    r"(?:^|[._])(?:pos|position|positional|cls|class|dist|distillation|mask|reg|register)"
    r"_(?:embed|embedding|token)s?(?:_\d+)?$"
)

PRESETS: dict[str, tuple[DecayRule, ...]] = {
    # All but biases, normalisation layers, vectors, numbers and what the model declares.
    "default": (_NO_DECAY, _DECAY),
    # The same, with a group of each matrix, for schedules that give each its own weight decay.
    "per_matrix": (_NO_DECAY, replace(_DECAY, per_parameter=True)),
    # What the default one exempts, to stand before rules of one's own: [exempt, {name: head, ...}, default].
    "exempt": (_NO_DECAY,),
    # Weights of linear layers only: rows of embedding tables of rare categories would decay without a gradient.
    "fully_connected": (_NO_DECAY, DecayRule("decay", modules=("Linear", "Bilinear"), optional=True), _REST_NO_DECAY),
    # Kernels of convolutions and linear layers only (He et al.: Bag of Tricks, arXiv 1812.01187, 2018).
    "cnn": (_NO_DECAY, DecayRule("decay", modules=_KERNELS, optional=True), _REST_NO_DECAY),
    # A layer before a normalisation is scale-invariant: decay there sets the effective learning rate only
    # (van Laarhoven: L2 Regularization versus Batch and Weight Normalization, arXiv 1706.05350, 2017).
    # The factor is a heuristic.
    "weaker_before_norm": (
        _NO_DECAY,
        DecayRule("before_norm", before_norm=True, multiplier=0.1, optional=True),
        _DECAY,
    ),
    # Matrices only: embeddings, positions and tokens are looked up or added, not multiplied with
    # (OLMo 2, arXiv 2501.00656, 2024, for embeddings).
    "transformer": (
        _NO_DECAY,
        DecayRule("embedding_no_decay", modules=("Embedding",), weight_decay=0.0, optional=True),
        DecayRule("position_no_decay", pattern=_POSITIONS, weight_decay=0.0, optional=True),
        _DECAY,
    ),
    # Decay on the recurrent matrices shortens the memory (Pascanu, Mikolov, Bengio: On the difficulty of training
    # recurrent neural networks, arXiv 1211.5063, 2012). The factor is a heuristic.
    "rnn": (
        _NO_DECAY,
        DecayRule("recurrent", pattern=r"weight_h[hr]", multiplier=0.1, optional=True),
        _DECAY,
    ),
}

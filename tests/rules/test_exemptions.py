"""Which modules are normalisation layers and which tensors are biases or magnitudes, by tables written by hand."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_l2.rules.exemptions import is_bias, is_gain, is_norm, is_weight_norm_magnitude

TORCH_NORMS = [
    nn.BatchNorm1d(2),
    nn.BatchNorm2d(2),
    nn.BatchNorm3d(2),
    nn.SyncBatchNorm(2),
    nn.LazyBatchNorm2d(),
    nn.GroupNorm(1, 2),
    nn.LayerNorm((2, 3)),
    nn.InstanceNorm1d(2, affine=True),
    nn.InstanceNorm2d(2, affine=True),
    nn.InstanceNorm3d(2, affine=True),
    nn.LocalResponseNorm(2),
    nn.RMSNorm(2),
]
TORCH_WEIGHT_LAYERS = [
    nn.Linear(2, 2),
    nn.Bilinear(2, 2, 2),
    nn.Conv1d(2, 2, 1),
    nn.ConvTranspose3d(2, 2, 1),
    nn.Embedding(2, 2),
    nn.EmbeddingBag(2, 2),
    nn.LSTM(2, 2),
    nn.GRUCell(2, 2),
    nn.MultiheadAttention(2, 1),
]


@pytest.mark.parametrize("module", TORCH_NORMS, ids=lambda module: type(module).__name__)
def test_norms_of_torch(module):
    assert is_norm(module, "anything")


@pytest.mark.parametrize("module", TORCH_WEIGHT_LAYERS, ids=lambda module: type(module).__name__)
def test_weight_layers_of_torch_are_no_norms_whatever_they_are_called(module):
    assert not is_norm(module, "norm1")


def test_what_only_contains_or_follows_a_norm_is_none():
    for module in (nn.TransformerEncoderLayer(2, 1), nn.Sequential(nn.LayerNorm(2)), nn.PReLU()):
        assert not is_norm(module, "body")


def test_norms_by_a_class_name_are_found():
    """Names out of transformers, timm and users' code."""
    names = [
        "MyBatchNorm",
        "LlamaRMSNorm",
        "T5LayerNorm",
        "RmsNorm2dFp32",
        "MambaRMSNormGated",
        "NemotronLayerNorm1P",
        "EvoNorm2dB0",
        "BatchRenorm",
        "StableLmLayerNormPerHead",
        "PeVideoEncoderRMSNorm",
        "BlockRMSNorm",
        "AutoformerLayernorm",
        "LayerNormalization",
        "ConvNextV2GRN",
        "InstanceNormalisation",
        "ConditionalBatchNorm2d",
        "GlobalResponseNorm",
        "FilterResponseNormTlu2d",
        "MyLN",
        "MyBN",
        "FRN",
        "layer_norm",
    ]
    missed = [name for name in names if not is_norm(type(name, (nn.Module,), {})(), "x")]
    assert missed == []


def test_class_names_that_only_mention_a_norm_are_none():
    names = [
        "NormLinear",
        "NormHead",
        "NormMlp",
        "NormFreeNet",
        "NormalCell",
        "NormalInverseGamma",
        "RMSNormEncoder",
        "LayerNormLSTMCell",
        "LayerNormMLP",
        "PreLayerNormAttention",
        "WeightNorm",
        "SpectralNorm",
        "Normalize",
        "Denormalizer",
        "CNN",
        "RCNN",
        "TCN",
        "GCN",
        "VGGNet",
        "TabNet",
        "GAN",
        "GNN",
        "BNNLayer",
        "Abnormal",
        "MyGNN",
    ]
    found = [name for name in names if is_norm(type(name, (nn.Module,), {})(), "x")]
    assert found == []


def test_a_weight_layer_is_none_whatever_its_names():
    norm_linear = type("LinearNorm", (nn.Linear,), {})(2, 2)
    assert not is_norm(norm_linear, "norm1")


def test_a_class_derived_from_a_norm_is_one_whatever_its_name():
    derived = type("AffineHead", (nn.LayerNorm,), {})((2, 2))
    assert is_norm(derived, "head")


@pytest.mark.parametrize(
    "attribute",
    ["norm", "norm1", "norm_2", "norms", "q_norm", "layer_norm", "input_layernorm", "RMSNorm", "final_normalization"],
)
def test_a_class_that_says_nothing_is_decided_by_its_attribute(attribute):
    scale = type("Scale", (nn.Module,), {})()
    assert is_norm(scale, attribute)


@pytest.mark.parametrize(
    "attribute", ["normalize_proj", "norm_proj", "normal", "abnormal", "denorm", "norm_head", "enormous", "proj", ""]
)
def test_attributes_that_are_no_norms(attribute):
    scale = type("Scale", (nn.Module,), {})()
    assert not is_norm(scale, attribute)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("QuantLinear", False), ("Conv1D", False), ("ScaledStdConv2d", False), ("BitDense", False), ("Rotary", True)],
)
def test_a_block_with_a_weight_layer_of_anybodys_own_is_no_norm(name, expected):
    block = type("ActNorm", (nn.Module,), {})()
    block.layer, block.norm = type(name, (nn.Module,), {})(), nn.LayerNorm(2)
    assert is_norm(block, "x") is expected


@pytest.mark.parametrize(
    ("owner", "shape", "expected"),
    [
        (nn.Module(), (4, 1, 1), True),
        (nn.Module(), (1, 1, 1), True),
        (nn.Module(), (4,), True),
        (nn.Module(), (), True),
        (nn.Module(), (4, 1, 2), False),
        (nn.Module(), (0, 4), False),
        (type("EmbeddingsBlock", (nn.Module,), {})(), (1, 1, 4), True),
        (type("ConvNeXtBlock", (nn.Module,), {})(), (4, 1, 1), True),
        (type("Embedding", (nn.Module,), {})(), (1, 4), False),
        (type("LinearLSTM", (nn.Module,), {})(), (1, 4), False),
        (nn.Bilinear(1, 1, 4), (4, 1, 1), False),
        (nn.ConvTranspose1d(1, 4, 1), (1, 4, 1), False),
    ],
)
def test_gains_by_shape_and_owner(owner, shape, expected):
    assert is_gain([owner], shape) is expected


def test_an_attribute_called_norm_makes_no_norm_of_another_layer():
    quantised = type("QuantLinear", (nn.Module,), {})()
    assert not is_norm(quantised, "norm1")


@pytest.mark.parametrize(
    "tensor",
    [
        "bias",
        "biases",
        "in_proj_bias",
        "bias_k",
        "bias_v",
        "pos_bias_u",
        "bias_ih_l0",
        "bias_hh_l1_reverse",
        "bias_ih",
        "bias_hh",
        "gate_up_proj_bias",
        "relative_position_bias_table",
        "attention_biases",
        "bias1",
        "bias_2",
    ],
)
def test_biases(tensor):
    assert is_bias(nn.Module(), "x", tensor)


@pytest.mark.parametrize(
    "tensor", ["debias", "debias_weight", "weight", "bias_proj", "bias_weight", "biased", "unbias", "bias_head_kernel"]
)
def test_no_biases(tensor):
    assert not is_bias(nn.Module(), "x", tensor)


def test_a_table_or_list_called_bias_holds_biases_but_a_linear_does_not():
    assert is_bias(nn.Embedding(2, 2), "relative_attention_bias", "weight")
    assert is_bias(nn.ParameterList(), "biases", "0")
    assert is_bias(nn.ParameterDict(), "bias", "left")
    assert not is_bias(nn.Linear(2, 2), "bias", "weight")
    assert not is_bias(nn.Embedding(2, 2), "debias", "weight")


def test_the_magnitude_of_both_weight_norms():
    new = parametrizations.weight_norm(nn.Linear(3, 4)).get_submodule("parametrizations.weight")
    assert [is_weight_norm_magnitude(new, name) for name, _ in new.named_parameters()] == [True, False]

    with pytest.warns(FutureWarning, match="weight_norm"):
        old = torch.nn.utils.weight_norm(nn.Linear(3, 4))
    magnitudes = {name: is_weight_norm_magnitude(old, name) for name, _ in old.named_parameters()}
    assert magnitudes == {"bias": False, "weight_g": True, "weight_v": False}


def test_other_parametrizations_have_no_magnitude():
    for parametrize in (parametrizations.spectral_norm, parametrizations.orthogonal):
        holder = parametrize(nn.Linear(3, 4)).get_submodule("parametrizations.weight")
        assert not any(is_weight_norm_magnitude(holder, name) for name, _ in holder.named_parameters())
    lone = nn.Module()
    lone.weight_g = nn.Parameter(torch.ones(2, 1))
    assert not is_weight_norm_magnitude(lone, "weight_g")

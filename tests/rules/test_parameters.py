"""What is known of a model's parameters: names, order, owners, shapes, declarations, through every kind of wrapper."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize

from lightning_l2.rules.parameters import clean_name, describe_parameters
from tests.processes import forked, sharded_parameters


def exempt(model):
    return {info.name for info in describe_parameters(model) if info.exempt}


def matrix(*shape):
    return nn.Parameter(torch.zeros(*(shape or (2, 2))))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("weight", "weight"),
        ("model.fc.weight", "model.fc.weight"),
        ("_orig_mod.fc.weight", "fc.weight"),
        ("model._orig_mod.fc.weight", "model.fc.weight"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module._checkpoint_wrapped_module.weight", "a.weight"),
        ("module.fc.weight", "module.fc.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_clean_name(name, expected):
    assert clean_name(name) == expected


def compiled(model):
    return torch.compile(model, backend="eager")


def mixed():
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 2, 3),
            "bn": nn.BatchNorm2d(2),
            "blocks": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.LayerNorm((2, 2))) for _ in range(2)]),
            "attention": nn.MultiheadAttention(2, 1, add_bias_kv=True),
            "lstm": nn.LSTM(2, 2, proj_size=1, bidirectional=True),
            "scale": nn.ParameterList([matrix(), matrix(3)]),
        }
    )


def test_names_parameters_and_ndims_are_those_of_the_model_in_its_order():
    model = mixed()
    infos = describe_parameters(model)
    named = list(model.named_parameters())
    assert [info.name for info in infos] == [name for name, _ in named]
    assert all(info.parameter is parameter for info, (_, parameter) in zip(infos, named, strict=True))
    assert [info.ndim for info in infos] == [parameter.ndim for _, parameter in named]


def test_parameters_directly_on_the_root():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.bias, self.gain, self.scale = matrix(), matrix(), matrix(3), nn.Parameter(torch.ones(()))

    assert exempt(Root()) == {"bias", "gain", "scale"}


def test_tied_parameters_appear_once_with_all_their_places():
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embedding"].weight
    (info,) = describe_parameters(model)
    assert [(place.name, type(place.owner)) for place in info.places] == [
        ("embedding.weight", nn.Embedding),
        ("head.weight", nn.Linear),
    ]


def test_a_shared_module_has_all_its_places():
    layer = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"first": nn.Sequential(layer), "second": nn.Sequential(layer)})
    (info,) = describe_parameters(model)
    assert [place.name for place in info.places] == ["first.0.weight", "second.0.weight"]


def test_frozen_parameters_are_described_too():
    model = nn.Linear(2, 2).requires_grad_(False)
    assert [info.name for info in describe_parameters(model)] == ["weight", "bias"]


def test_a_lazy_parameter_is_an_error_until_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with pytest.raises(RuntimeError) as caught:
        describe_parameters(model)
    assert str(caught.value) == (
        "The lazy parameter '0.weight' has no shape yet, so no rule can decide on it. "
        "Run one batch through the model first."
    )
    model(torch.ones(4, 3))
    assert exempt(model) == {"0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda model: nn.DataParallel(compiled(model)),
        checkpoint_wrapper,
    ],
)
def test_wrappers_change_neither_names_nor_decisions(wrap):
    inner = mixed()
    expected = [(info.name, info.ndim, info.exempt) for info in describe_parameters(inner)]
    assert [(info.name, info.ndim, info.exempt) for info in describe_parameters(wrap(inner))] == expected
    below = nn.ModuleDict({"model": wrap(inner)})
    assert [info.name for info in describe_parameters(below)] == [f"model.{name}" for name, _, _ in expected]


def test_wrapped_layers_keep_their_norms_after_them():
    plain = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), nn.BatchNorm1d(1))
    for model in (plain, nn.Sequential(*map(checkpoint_wrapper, plain)), nn.Sequential(*map(compiled, plain))):
        assert [info.places[0].before_norm for info in describe_parameters(model)] == [True, False, False]


def test_a_users_own_child_called_module_keeps_its_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.module = matrix(), nn.Linear(2, 2)

    assert [info.name for info in describe_parameters(Net())] == ["weight", "module.weight", "module.bias"]


def test_a_wrapper_is_known_by_its_class():
    """DeepSpeed is not installed here; other classes of a wrapper's name that wrap nothing are no wrappers."""
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    empty = type("DataParallel", (nn.Module,), {})()
    engine.module = nn.ModuleDict({"layer": nn.Linear(1, 1, bias=False), "next": nn.LayerNorm(1)})
    assert [info.name for info in describe_parameters(engine)] == ["layer.weight", "next.weight", "next.bias"]
    infos = describe_parameters(nn.ModuleDict({"layer": nn.Linear(1, 1, bias=False), "next": empty}))
    assert [(info.name, info.places[0].before_norm) for info in infos] == [("layer.weight", False)]


def test_a_users_own_child_called_parametrizations():
    model = nn.ModuleDict({"parametrizations": nn.ModuleDict({"weight": nn.Linear(2, 2)})})
    assert [info.name for info in describe_parameters(model)] == [name for name, _ in model.named_parameters()]
    assert [type(info.places[0].owner) for info in describe_parameters(model)] == [nn.Linear, nn.Linear]


def test_parametrized_tensors_belong_to_their_layer():
    model = nn.ModuleDict(
        {
            "spectral": parametrizations.spectral_norm(nn.Linear(3, 3)),
            "orthogonal": parametrizations.orthogonal(nn.Linear(3, 3)),
            "weight_norm": parametrizations.weight_norm(nn.Conv1d(3, 4, 2)),
            "norm": parametrizations.spectral_norm(nn.LayerNorm((3, 3))),
        }
    )
    infos = describe_parameters(model)
    assert [info.name for info in infos] == [name for name, _ in model.named_parameters()]
    owners = {info.name: info.places[0].owner for info in infos}
    assert owners["spectral.parametrizations.weight.original"] is model["spectral"]
    assert owners["weight_norm.parametrizations.weight.original1"] is model["weight_norm"]
    # v is decayed as any kernel, g is a gain with dimensions of size 1: exempt as that of a normalisation layer
    assert exempt(model) == {
        "spectral.bias",
        "orthogonal.bias",
        "weight_norm.bias",
        "weight_norm.parametrizations.weight.original0",
        "norm.bias",
        "norm.parametrizations.weight.original",
    }


def test_parameters_of_a_parametrization_itself():
    class Symmetric(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.bias = matrix(), matrix()

        def forward(self, weight):
            return weight @ self.mix + self.bias

    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    infos = describe_parameters(model)
    assert [info.name for info in infos] == [name for name, _ in model.named_parameters()]
    assert [type(info.places[0].owner).__name__ for info in infos] == ["ParametrizedLinear", "Symmetric", "Symmetric"]
    assert exempt(model) == {"0.parametrizations.weight.0.bias"}


def test_a_parametrized_bias_is_a_bias_of_any_shape():
    layer = nn.Module()
    layer.bias = matrix()
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    assert exempt(layer) == {"parametrizations.bias.original"}


def test_vectors_behind_dimensions_of_size_1():
    """As layer scales, gains of IA3, class tokens; kernels of such shapes decay, and what is tied to one does too."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_scale, self.class_token, self.temperature = matrix(4, 1, 1), matrix(1, 1, 4), matrix(1, 1)
            self.ia3 = nn.ParameterDict({"default": matrix(4, 1)})
            self.positions, self.grid = matrix(1, 2, 4), matrix(2, 1, 2)

    gains = {"layer_scale", "class_token", "temperature", "ia3.default"}
    assert exempt(Block()) == gains
    kernels = [nn.Conv2d(4, 4, 1, groups=4), nn.Linear(4, 1), nn.Linear(1, 4), nn.Embedding(1, 4), nn.LSTM(1, 1)]
    assert {name for name in exempt(nn.ModuleList(kernels)) if "weight" in name} == set()
    own = type("QuantLinear", (nn.Module,), {})()
    own.kernel = matrix(1, 4)
    tied = nn.ModuleDict({"free": nn.Module(), "head": nn.Linear(4, 1, bias=False), "quantised": own})
    tied["free"].vector = tied["head"].weight
    assert exempt(tied) == set()
    spectral = parametrizations.spectral_norm(nn.Linear(4, 1, bias=False))
    assert exempt(spectral) == set()


def test_the_state_matrix_of_a_state_space_model():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.A_log, self.D, self.x_proj = matrix(4, 2), matrix(4), nn.Linear(4, 4, bias=False)

    assert exempt(nn.ModuleDict({"mixer": Mixer()})) == {"mixer.A_log", "mixer.D"}


def test_a_marked_parameter_is_exempt():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight._no_weight_decay = True
    model[0].weight._no_weight_decay = False
    assert exempt(model) == {"1.weight"}


class Vit(nn.Module):
    """Declares as timm's models do: names relative to itself, also ones that it does not have."""

    def __init__(self, declared=("pos_embed", "cls_token", "dist_token"), keywords=()):
        super().__init__()
        self.cls_token, self.pos_embed = matrix(1, 2, 4), matrix(1, 5, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
        self.declared, self.keywords = declared, keywords

    def no_weight_decay(self):
        return self.declared

    def no_weight_decay_keywords(self):
        return self.keywords


@pytest.mark.parametrize("kind", [set, frozenset, list, tuple, dict.fromkeys])
@pytest.mark.parametrize("prefix", ["", "model.", "student.0.backbone."])
def test_declared_names_count_below_any_prefix(kind, prefix):
    model = Vit(kind(["pos_embed", "cls_token", "dist_token"]))
    for component in reversed(prefix.split(".")[:-1]):
        model = nn.ModuleDict({component: model})
    assert exempt(model) == {f"{prefix}cls_token", f"{prefix}pos_embed"}


def test_declared_names_count_in_a_compiled_model():
    assert exempt(compiled(Vit())) == {"cls_token", "pos_embed"}
    assert exempt(nn.ModuleDict({"model": compiled(Vit())})) == {"model.cls_token", "model.pos_embed"}


def test_a_declared_name_is_a_whole_name():
    assert exempt(Vit(["weight", "s.0.weight", "block"])) == {"blocks.0.weight", "blocks.1.weight"}
    assert exempt(Vit(["0.weight"])) == {"blocks.0.weight"}
    assert exempt(Vit(["eight", "blocks"])) == set()


def test_an_exact_name_means_no_deeper_one():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed, self.inner = matrix(), nn.Module()
            self.inner.pos_embed = matrix()

        def no_weight_decay(self):
            return {"pos_embed"}

    assert exempt(Outer()) == {"pos_embed"}


def test_wildcards_and_keywords():
    assert exempt(Vit(["blocks.*.weight"])) == {"blocks.0.weight", "blocks.1.weight"}
    assert exempt(Vit([], ["embed", "s.1"])) == {"pos_embed", "blocks.1.weight"}


def test_a_module_may_pass_on_what_its_child_declares():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Module()
            self.backbone.pos_embed = matrix()

        def no_weight_decay(self):
            return {"pos_embed"}

    assert exempt(nn.ModuleDict({"a": Wrapper(), "b": nn.Embedding(2, 2)})) == {"a.backbone.pos_embed"}


def test_a_declaration_reaches_only_its_own_module():
    model = nn.ModuleDict({"a": Vit(["blocks.0.weight"], ["pos"]), "b": Vit([])})
    assert exempt(model) == {"a.blocks.0.weight", "a.pos_embed"}


def test_a_declared_tied_parameter_is_exempt_under_each_name():
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "vit": Vit(["blocks.0.weight"])})
    model["vit"].blocks[0].weight = model["embedding"].weight
    assert exempt(model) == {"embedding.weight"}


def test_an_attribute_with_names_declares_too_and_a_flag_does_not():
    model = Vit([])
    model.no_weight_decay = {"pos_embed"}
    assert exempt(model) == {"pos_embed"}
    model.no_weight_decay = True
    assert exempt(model) == set()


@pytest.mark.parametrize("declared", ["pos_embed", None, [1], True])
def test_a_declaration_that_is_no_collection_of_names_is_an_error(declared):
    with pytest.raises(TypeError) as caught:
        describe_parameters(Vit(declared))
    assert str(caught.value) == (
        f"Vit.no_weight_decay() must return a set, list or dict of parameter names, got {declared!r}."
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), {"0.weight", "0.bias"}),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2)), set()),
        (nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)), set()),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.LayerNorm(2)), set()),
        (nn.ModuleDict({"conv": nn.Conv1d(1, 1, 1), "norm1": nn.Identity()}), {"conv.weight", "conv.bias"}),
        (nn.Linear(2, 2), set()),
    ],
)
def test_before_norm_means_directly_followed_in_the_order_of_registration(model, expected):
    infos = describe_parameters(model)
    assert {info.name for info in infos if info.places[0].before_norm} == expected


def test_a_norm_in_a_list_is_known_by_the_name_of_the_list():
    scale = nn.Module()
    scale.gain = matrix()
    model = nn.ModuleDict({"norms": nn.ModuleList([copy.deepcopy(scale)]), "others": nn.ModuleList([scale])})
    assert exempt(model) == {"norms.0.gain"}


def test_zero_3_parameters_have_their_own_shape():
    """DeepSpeed leaves parameters of ZeRO-3 empty and keeps the shape in `ds_shape`."""
    model = nn.Linear(3, 2)
    for parameter, shape in ((model.weight, (2, 3)), (model.bias, (2,))):
        parameter.data = torch.empty(0)
        parameter.ds_shape = torch.Size(shape)
    assert [(info.name, info.ndim) for info in describe_parameters(model)] == [("weight", 2), ("bias", 1)]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The decisions that two processes make on sharded models."""
    path = tmp_path_factory.mktemp("sharded")
    forked.ranks(sharded_parameters.work, path)
    return [json.loads((path / f"{rank}.json").read_text()) for rank in range(2)]


WHOLE = {
    "conv.weight": ["decay", 3],
    "conv.bias": ["no_decay", 1],
    "layers.0.weight": ["decay", 2],
    "layers.0.bias": ["no_decay", 1],
    "layers.1.weight": ["no_decay", 2],
    "layers.1.bias": ["no_decay", 2],
    "head.weight": ["decay", 2],
}


@pytest.mark.parametrize("kind", ["whole", "fsdp1", "fsdp1_inner", "fsdp1_flat", "fsdp2", "ddp"])
def test_sharded_models_are_decided_as_whole_ones(sharded, kind):
    for rank in range(2):
        assert sharded[rank][kind] == WHOLE


def test_fsdp1_shards_are_the_parameters_that_an_optimizer_gets(sharded):
    assert sharded[0]["identity"] is True


def test_a_flat_parameter_cannot_mix_rules(sharded):
    assert sharded[0]["mixed"] == (
        "FSDP has flattened 'conv.weight' (rule 'decay') and 'conv.bias' (rule 'no_decay') into one parameter, which "
        "can have only one weight decay. Use FSDP with use_orig_params=True."
    )


def test_shards_of_an_fsdp_outside_of_the_module_are_an_error(sharded):
    """They are 1-D, so a guess would exempt them all."""
    assert sharded[0]["outside"] == (
        "FSDP has flattened the parameter 'conv.weight', and the FullyShardedDataParallel that knows its shape is "
        "outside of the module. Give the outermost module as `root` (in Lightning `trainer.strategy.model`), or decide "
        "before the module is wrapped."
    )


def test_a_flat_parameter_of_one_rule_has_it(sharded):
    assert sharded[0]["single"] == [["conv.weight", "all"], ["layers.0.weight", "all"]]

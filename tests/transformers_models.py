"""Tiny models of transformers with random weights, and what an expert decays in them, written by hand.

Per model: the classes of its normalisation layers, and the other parameters that are exempt although they are neither
of such a layer nor called `bias`.
"""

from __future__ import annotations

import transformers

_SIZE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
_TEXT = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, **_SIZE}
_IMAGE = {"image_size": 8, "patch_size": 4, **_SIZE}


def _build(name, **options):
    config = getattr(
        transformers, f"{name[: name.index('For')] if 'For' in name else name.removesuffix('Model')}Config"
    )
    return lambda: getattr(transformers, name)(config(**options))


MODELS = {
    "bert": (_build("BertForMaskedLM", **_TEXT), {"LayerNorm"}, set()),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
        ),
        {"LayerNorm"},
        set(),
    ),
    "llama": (_build("LlamaForCausalLM", **_TEXT), {"LlamaRMSNorm"}, set()),
    "qwen3": (_build("Qwen3ForCausalLM", num_key_value_heads=2, head_dim=4, **_TEXT), {"Qwen3RMSNorm"}, set()),
    "vit": (_build("ViTForImageClassification", **_IMAGE), {"LayerNorm"}, {"vit.embeddings.cls_token"}),
    "resnet": (
        _build("ResNetForImageClassification", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]),
        {"BatchNorm2d"},
        set(),
    ),
    "convnextv2": (
        _build("ConvNextV2ForImageClassification", hidden_sizes=[4, 8], depths=[1, 1], num_stages=2),
        {"LayerNorm", "ConvNextV2LayerNorm", "ConvNextV2GRN"},
        set(),
    ),
    "swin": (
        _build("SwinForImageClassification", image_size=8, patch_size=2, embed_dim=4, depths=[1], num_heads=[2],
               window_size=2),
        {"LayerNorm"},
        {"swin.encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table"},
    ),
    "t5": (
        _build("T5ForConditionalGeneration", vocab_size=64, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2),
        {"T5LayerNorm"},
        {
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        },
    ),
    "mamba": (
        _build("MambaForCausalLM", vocab_size=64, hidden_size=8, num_hidden_layers=1),
        {"MambaRMSNorm"},
        {"backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.D"},
    ),
    "mamba2": (
        _build("Mamba2ForCausalLM", vocab_size=64, hidden_size=8, num_hidden_layers=1, num_heads=2, head_dim=8,
               n_groups=1),
        {"Mamba2RMSNorm", "MambaRMSNormGated"},
        {f"backbone.layers.0.mixer.{name}" for name in ("A_log", "D", "dt_bias")},
    ),
    "wav2vec2": (
        _build("Wav2Vec2ForCTC", vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
               intermediate_size=16, conv_dim=(8,), conv_kernel=(3,), conv_stride=(2,), num_conv_pos_embeddings=4,
               num_conv_pos_embedding_groups=2),
        {"LayerNorm", "GroupNorm"},
        {
            "wav2vec2.masked_spec_embed",
            "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0",
        },
    ),
    "clip": (
        lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=_TEXT, vision_config=_IMAGE)),
        {"LayerNorm"},
        {"logit_scale", "vision_model.embeddings.class_embedding"},
    ),
    "gpt_oss": (
        _build("GptOssForCausalLM", num_key_value_heads=2, head_dim=4, num_local_experts=2, num_experts_per_tok=1,
               **_TEXT),
        {"GptOssRMSNorm"},
        {
            "model.layers.0.self_attn.sinks",
            "model.layers.0.mlp.experts.gate_up_proj_bias",
            "model.layers.0.mlp.experts.down_proj_bias",
        },
    ),
}  # fmt: skip

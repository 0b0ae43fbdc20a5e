"""What the default selection takes of the parameters of ten libraries and families.

Each line has a parameter's path and shape as these libraries name them; `+` in front of
what is to be taken.
"""

import jax
import numpy as np
import pytest

import jaxsparse as js

TREES = {
    "Linen": """
        - Embed_0/embedding 64x8
        - pos_embedding 1x16x8
        - cls 1x1x8
        + Dense_0/kernel 8x8
        - Dense_0/bias 8
        + encoderblock_0/MultiHeadDotProductAttention_0/query/kernel 8x2x4
        - encoderblock_0/MultiHeadDotProductAttention_0/query/bias 2x4
        + encoderblock_0/MultiHeadDotProductAttention_0/out/kernel 2x4x8
        - encoderblock_0/LayerNorm_0/scale 3x8
        - encoderblock_0/LayerNorm_0/bias 3x8
        + Conv_0/kernel 3x3x8x8
        + OptimizedLSTMCell_0/hi/kernel 8x8
    """,
    "NNX": """
        - embed/embedding 64x8
        - tokens/embedding 64x8
        + blocks/0/linear/kernel 8x8
        - blocks/0/linear/lora_a 8x2
        - blocks/0/linear/lora_b 2x8
        + blocks/0/attn/key/kernel 8x2x4
        - blocks/0/attn/key/bias 2x4
    """,
    "big_vision": """
        + embedding/kernel 16x16x3x8
        - embedding/bias 8
        - pos_embedding 1x16x8
        - MAPHead_0/probe 1x1x8
        + MAPHead_0/MlpBlock_0/Dense_0/kernel 8x32
        - Transformer/encoderblock/LayerNorm_0/scale 3x8
        + Transformer/encoderblock/MlpBlock_0/Dense_0/kernel 3x8x32
        - Transformer/encoderblock/MlpBlock_0/Dense_0/bias 3x32
        + head/kernel 8x10
    """,
    "Flax models of Hugging Face": """
        - transformer/wte/embedding 64x8
        - transformer/wpe/embedding 16x8
        + transformer/h/0/attn/c_attn/kernel 24x8
        - transformer/h/0/ln_1/scale 8
        - shared/embedding 64x8
        + encoder/block/0/layer/0/SelfAttention/q/kernel 8x8
        - encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding 32x2
        + encoder/block/0/layer/1/DenseReluDense/wi_0/kernel 8x16
        + lm_head/kernel 8x64
    """,
    "Keras": """
        - embedding/embeddings 64x8
        - token_embedding/embeddings 64x8
        - token_embedding/reverse_embeddings 8x64
        - position_embedding/embeddings 16x8
        + dense/kernel 8x8
        + conv2d/kernel 3x3x3x8
        + depthwise_conv2d/kernel 3x3x8x1
        + multi_head_attention/query/kernel 8x2x4
        - multi_head_attention/query/bias 2x4
        + lstm/lstm_cell/kernel 8x32
        + lstm/lstm_cell/recurrent_kernel 8x32
        - p_re_lu/alpha 1x1x8
        - batch_normalization/gamma 3x8
        - batch_normalization/beta 3x8
    """,
    "Haiku": """
        - transformer/embed/embeddings 64x8
        - transformer/~/embed/embeddings 64x8
        - transformer/positional_embeddings 16x8
        - transformer/pos_embs 16x8
        + transformer/h0_attn/query/w 8x8
        - transformer/h0_attn/query/b 8
        + mlp/~/linear_0/w 8x8
        - layer_norm/scale 8
        - transformer/ln_f/scale 3x8
    """,
    "Equinox": """
        - embedding/weight 64x8
        - position_embedder/embedding/weight 16x8
        - cls_token 1x8
        - pos_embedding 16x8
        + layers/0/weight 8x8
        - layers/0/bias 8
        + attention/query_proj/weight 8x8
        + conv1/weight 8x3x3x3
        - norm1/weight 3x8
        - norm1/bias 3x8
    """,
    "MaxText": """
        - params/token_embedder/embedding 64x8
        - params/position_embedder/embedding 16x8
        + params/decoder/layers/mlp/wi_0/kernel 8x3x16
        - params/decoder/layers/pre_self_attention_layer_norm/scale 8x3
        + params/decoder/layers/self_attention/query/kernel 8x3x2x4
        + params/decoder/layers/MoeBlock_0/wi_0 4x8x16
        - params/decoder/decoder_norm/scale 8
        + params/decoder/logits_dense/kernel 8x64
    """,
    "Gemma": """
        - embedder/input_embedding 64x8
        + layer_0/attn/q_einsum/w 2x8x4
        + layer_0/attn/kv_einsum/w 2x1x8x4
        + layer_0/attn/attn_vec_einsum/w 2x4x8
        + layer_0/mlp/gating_einsum 2x8x16
        + layer_0/mlp/linear 16x8
        - layer_0/pre_attention_norm/scale 3x8
    """,
    "torch: language models": """
        - tok_embeddings/weight 64x8
        - model/embed_tokens/weight 64x8
        + model/layers/0/self_attn/q_proj/weight 8x8
        + layers/0/attention/wq/weight 8x8
        + layers/0/feed_forward/w1/weight 16x8
        - layers/0/input_layernorm/weight 3x8
        - layers/0/attention_norm/weight 3x8
        - freqs_cis 16x4
        + output/weight 64x8
        - gpt_neox/embed_in/weight 64x8
        + gpt_neox/layers/0/attention/query_key_value/weight 24x8
        + embed_out/weight 64x8
        - wte/weight 64x8
        - wpe/weight 16x8
        + h/0/attn/c_proj/weight 8x8
        - h/0/ln_2/weight 3x8
        - shared/weight 64x8
        - encoder/block/0/layer/0/SelfAttention/relative_attention_bias/weight 32x2
        - bert/embeddings/word_embeddings/weight 64x8
        - bert/embeddings/position_embeddings/weight 16x8
        - bert/embeddings/token_type_embeddings/weight 2x8
        - bert/embeddings/LayerNorm/weight 3x8
        + bert/encoder/layer/0/attention/self/query/weight 8x8
        + cls/predictions/transform/dense/weight 8x8
        + cls/seq_relationship/weight 2x8
        + encoder/embedding_hidden_mapping_in/weight 8x16
        + transformer/in_proj_weight 24x8
        + rnn/weight_ih_l0 8x8
        - rnn/bias_ih_l0 3x8
    """,
    "torch: vision, speech and diffusion": """
        - cls_token 1x1x8
        - dist_token 1x1x8
        - reg_token 1x4x8
        - mask_token 1x1x8
        - pos_embed 1x16x8
        + patch_embed/proj/weight 8x3x4x4
        + blocks/0/attn/qkv/weight 24x8
        - blocks/0/attn/relative_position_bias_table 49x2
        - blocks/0/attn/rel_pos_h 13x4
        + head/weight 10x8
        - vit/embeddings/position_embeddings 1x16x8
        + vit/embeddings/patch_embeddings/projection/weight 8x3x4x4
        + vision_model/embeddings/patch_embedding/weight 8x3x4x4
        - text_model/embeddings/token_embedding/weight 64x8
        + visual_projection/weight 8x8
        - encoder/embed_positions/weight 16x8
        + encoder/conv1/weight 8x8x3
        - query_tokens 1x4x8
        - detr/query_embed/weight 10x8
        + class_embed/weight 10x8
        - class_embed/bias 10
        + time_embed/0/weight 8x8
        - time_embed/0/bias 8
        + time_embedding/linear_1/weight 8x8
        + encoder/pos_conv_embed/conv/weight_v 8x8x3
        - encoder/pos_conv_embed/conv/weight_g 1x1x3
        + encoder/layers/0/self_attn/linear_pos/weight 8x8
    """,
    "adapters": """
        + model/layers/0/q_proj/base_layer/weight 8x8
        - model/layers/0/q_proj/lora_A/default/weight 2x8
        - model/layers/0/q_proj/lora_B/default/weight 8x2
        - model/embed_tokens/lora_embedding_A 2x64
        - self_attention/query_lora_a/kernel 8x2
        - lora_a 8x2
        - lora_b 2x8
        - prompt_embeddings 4x8
        - prompt 4x8
    """,
}


def parsed(name):
    """Paths, a tree by them, and the paths that are to be taken."""
    tree, wanted = {}, set()
    for line in TREES[name].strip().splitlines():
        sign, path, size = line.split()
        shape = tuple(map(int, size.split("x")))
        tree[path] = jax.ShapeDtypeStruct(shape, np.float32)
        if sign == "+":
            wanted.add(path)
    return tree, wanted


@pytest.mark.parametrize("name", TREES)
def test_it_takes_the_kernels_and_nothing_else(name):
    tree, wanted = parsed(name)
    assert {path for path, take in js.tree.select(tree).items() if take} == wanted


@pytest.mark.parametrize(
    ("path", "shape", "why"),
    [
        ("wte/weight", (64, 8), "an embedding"),
        ("cls_token", (1, 1, 8), "a token"),
        ("rel_pos_h", (13, 4), "a position"),
        ("q_proj/lora_A/weight", (2, 8), "a LoRA factor"),
        ("ln_1/weight", (3, 8), "a scale"),
        ("query/bias", (2, 4), "a bias"),
        ("dense/bias", (4,), "fewer than two axes"),
    ],
)
def test_it_says_why_it_leaves_a_parameter(path, shape, why):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    assert js.tree.why_dense(path, leaf) == why


def test_a_module_with_a_bias_is_no_table_whatever_its_name():
    table = jax.ShapeDtypeStruct((10, 8), np.float32)
    bias = jax.ShapeDtypeStruct((10,), np.float32)
    with pytest.raises(ValueError, match=r"default selection .* matches none"):
        js.tree.select({"shared": {"weight": table}})
    selected = js.tree.select({"shared": {"weight": table, "bias": bias}})
    assert selected == {"shared": {"weight": True, "bias": False}}

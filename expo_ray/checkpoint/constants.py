"""Recognise stored tensors that no optimiser changes: constants, caches, running statistics, calibration.

`transformers` registers them as buffers. Older versions stored many that newer ones compute, so one parent may lack them, or have
them in another dtype or with another value. They are not extrapolated: the values of a model fit that model only.
"""

from __future__ import annotations

import re

from expo_ray.checkpoint.tensors import Tensor

# The last parts of the names, from the buffers of all architectures in transformers 5.19, and of what older versions stored.
_NAMES = re.compile(
    r"(?:^|\.)(?:"
    # rotary and other fixed positions
    r"(?:\w+_)?inv_freq|sinusoid_freq|(?:cos|sin)_cached?|cos_sin_cache|freqs_(?:cis?|cos|sin)|rope\.freqs|rotary_emb\.(?:cos|sin)"
    r"|rotary_pos_emb\.(?:cos|sin)|position_ids|token_type_ids|position_angles|pos_encoding|pos_enc\.pos_enc|pos_idx_to_embed"
    r"|embed_positions\.(?:pe|weights)|attn\.embed_positions|positional_encoding_gaussian_matrix|time_position_embeddings"
    r"|relative_coords_table|relative_position_index"
    # masks and slopes
    r"|masked_bias|(?:self_)?mask_value_float(?:16|32)|causal_mask|attn_mask|alibi|slope_rate|(?:query|key|diagonal)_decay"
    # scalars of a class
    r"|embed_scale|normalizer|mup_vector|layer_scalar|router_input_scale|per_layer_(?:input|projection)_scale|act_fn\.(?:beta|eps)"
    # running statistics
    r"|running_(?:mean|var)|num_batches_tracked|e_score_correction_bias|balancing_biases|expert_bias|final_logits_bias"
    r"|codebook\.(?:embed|embed_avg|embed_sum|cluster_size|cluster_usage|inited|initialized)"
    # signal processing
    r"|global_(?:mean|invstd)|vocoder\.(?:mean|scale)|mel_filters?|mel_basis|(?:up|down)sample\.filter"
    # calibration
    r"|[kvq]_scale|prob_scale|(?:input|output)_scale|input_amax|(?:act|fc|weight)_scaling_factor|x_m(?:in|ax)"
    r"|(?:weight|bias)_integer|LayerNorm\.shift"
    r")$"
)
# GPT-2, GPT-Neo and NeoX call their causal mask `attn.bias`, as others call the learned bias of a projection.
_MASK = re.compile(r"(?:^|\.)(?:attn|attention)\.(?:masked_)?bias$")


def is_constant(tensor: Tensor) -> bool:
    """True if `tensor` is copied from dpo instead of extrapolated."""
    return bool(_NAMES.search(tensor.name)) or (bool(_MASK.search(tensor.name)) and _is_mask(tensor.shape))


def _is_mask(shape: tuple[int, ...]) -> bool:
    return len(shape) != 1 and shape[-2:] == shape[-1:] * 2 if shape else True

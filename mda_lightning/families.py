"""Model families as data: one row each, and nowhere else a model's attributes by name.

To add a family, add its row to :data:`FAMILIES` under the ``model_type`` of its configuration and
its name to the tests' list; ``docs/families.md`` shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Family:
    """One model family: names of its parts, dotted, and how they are put together.

    Attributes:
        layers: the list of layers, from the language model down.
        final_norm: the norm before the unembedding, from the language model down.
        attention, mlp: the two sublayers, from a layer down.
        attention_norm, mlp_norm: their norms, from a layer down.
        q, k, v, output: the projections, from the attention down. ``output``'s input columns are
            ``[heads, head_dim]``.
        fused: how query, key and value lie in the rows of one fused projection: "by_head" is
            ``[heads, 3, head_dim]``, "by_kind" is ``[3, heads, head_dim]``; None where each has a
            projection of its own, keys and values perhaps with fewer heads (grouped queries).
        norms: "before" a sublayer, x + f(norm(x)), or "after" it, x + norm(f(x)).
        parallel: whether the MLP reads the same stream as the attention, or the name of the
            configuration's entry that says so.
        norms_across_heads: whether queries and keys are normalised over all heads of a layer
            together, so that a head's pattern depends on its neighbours' weights.
    """

    layers: str
    final_norm: str
    attention: str
    mlp: str
    attention_norm: str
    mlp_norm: str
    q: str
    k: str
    v: str
    output: str
    fused: Literal["by_head", "by_kind"] | None = None
    norms: Literal["before", "after"] = "before"
    parallel: bool | str = False
    norms_across_heads: bool = False


_LLAMA = Family(
    layers="model.layers",
    final_norm="model.norm",
    attention="self_attn",
    mlp="mlp",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    output="o_proj",
)

FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        mlp="mlp",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        q="query_key_value",
        k="query_key_value",
        v="query_key_value",
        output="dense",
        fused="by_head",
        parallel="use_parallel_residual",
    ),
    "gpt2": Family(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        mlp="mlp",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        q="c_attn",
        k="c_attn",
        v="c_attn",
        output="c_proj",
        fused="by_kind",
    ),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "olmo2": replace(
        _LLAMA,
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        norms="after",
        norms_across_heads=True,
    ),
}

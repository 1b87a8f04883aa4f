"""A model of the same family in miniature: the same class and options, with small sides."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ....errors import UserError

_WIDTH, _HEADS, _LAYERS, _FEED, _EXPERTS = 64, 2, 2, 128, 4
_LAYER_NAMES = (
    "num_hidden_layers n_layer n_layers num_layers num_decoder_layers num_encoder_layers encoder_layers decoder_layers "
    "num_hidden_groups"
).split()
_NAMES = (
    (_WIDTH, "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim pooler_hidden_size".split()),
    (_WIDTH // _HEADS, "head_dim d_kv d_head rotary_dim".split()),
    (_LAYERS, _LAYER_NAMES),
    (_HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads".split()),
    (_HEADS, "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk".split()),
    (
        _FEED,
        "intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim ffn_hidden_size".split(),
    ),
    (_FEED, "moe_intermediate_size shared_expert_intermediate_size".split()),
    (_EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts".split()),
)
SMALL = {name: size for size, names in _NAMES for name in names}
"""The largest value of each size that transformers configs name."""

DEFAULTS = {"pretrain": "gpt2", "finetune": "llama", "classify": "bert", "seq2seq": "t5", "masked-lm": "bert"}
"""The family that stands in for pretrained weights of which nothing is known here."""

_MODULES = {"llama": {"q_proj", "v_proj", "k_proj", "o_proj"}, "gpt2": {"c_attn"}, "bert": {"query", "value", "key"}}


def shrink(
    config: dict[str, Any], known: dict[str, Any], works: Callable[[dict[str, Any]], bool]
) -> tuple[dict[str, Any], list[str]]:
    """A config with small sides, and each change as ``n_layer 12 → 2``.

    Where these sides do not fit each other, all but the layers are made small, or only they.

    Args:
        config: what a recipe says, or all of a config.
        known: every value of the config, defaults included: a size that the recipe leaves out is made small too.
        works: whether a model can be made of a config.

    Raises:
        UserError: no way works.
    """
    for names in (SMALL.keys(), SMALL.keys() - set(_LAYER_NAMES), _LAYER_NAMES):
        small, changes = _shrunk(config, known, names)
        if works(small):
            return small, changes
    raise UserError(
        f"no small {known.get('model_type', 'model')} could be made for the smoke test: its sizes depend on each other "
        "in ways not known here; --dry-run checks the recipe at its full size"
    )


def _shrunk(config: dict[str, Any], known: dict[str, Any], names: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    small, changes = dict(config), []
    layers = next((known[name] for name in _LAYER_NAMES if isinstance(known.get(name), int)), None)
    for name, value in known.items():
        if name == "head_dim" and "qk_rope_head_dim" in known:
            continue  # made of others
        if name in names and isinstance(value, int) and not isinstance(value, bool) and value > SMALL[name]:
            small[name] = SMALL[name]
            changes.append(f"{name} {value:,} → {SMALL[name]}")
        elif isinstance(value, list) and len(value) == layers and layers > _LAYERS and _LAYER_NAMES[0] in names:
            small[name] = value[:_LAYERS]
            changes.append(f"{name}: the first {_LAYERS}")
    return small, changes


def guess_family(name: str, task: str, target_modules: Any, families: set[str]) -> str:
    """The family of a pretrained model of which only the name is known.

    The longest of `families` that the name contains; else the task's own, or for adapters one that has their modules.
    """
    bare = "".join(character for character in name.lower() if character.isalnum())
    inside = [family for family in families if family.replace("_", "").replace("-", "") in bare and len(family) > 1]
    if inside:
        return max(inside, key=len)
    wanted = {target_modules} if isinstance(target_modules, str) else set(target_modules or ())
    fitting = (family for family, modules in _MODULES.items() if wanted & modules and family in families)
    return next(fitting, DEFAULTS[task]) if wanted else DEFAULTS[task]

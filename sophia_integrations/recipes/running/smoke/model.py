"""The tokenizer and the pretrained model of a smoke test: small, random, made on the spot, of the recipe's family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import UserError
from ....text.cache import digest
from ....text.source import Source, Split
from ....text.tokenizer import load_tokenizer, padding, train_tokenizer
from ..tasks import TASKS
from .data import Sample, why
from .tiny import guess_family, shrink

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY = 512
_LARGEST = 50_000_000  # parameters
_CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def smoke_tokenizer(
    place: str, options: Mapping[str, Any], rows: Sample, task: str, folder: Path
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The pretrained tokenizer of `place`, or one trained on `rows` where it is not on this machine; in `folder`.

    Also returns what was changed, or None.
    """
    note = None
    try:
        tokenizer = load_tokenizer(place, options.get("revision"), bool(options.get("trust_remote_code")))
    except UserError as error:
        texts = [{"text": text} for text in rows.texts()]
        source = Source("text", Split(texts), Split([]), digest(row["text"] for row in texts))
        tokenizer = train_tokenizer(source, VOCABULARY, 2, lambda line: None, task)
        if rows.format == "chat":
            tokenizer.chat_template = _CHAT
        note = f"tokenizer: {place} {why(error)}; one of {len(tokenizer)} tokens, trained on the rows, takes its place"
    tokenizer.save_pretrained(folder)
    return tokenizer, note


def smoke_model(
    wanted: Mapping[str, Any], task: str, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """The ``model`` section with a small random model, stored in `folder`, for the pretrained one; and the changes."""
    import torch
    import transformers

    place, changes = wanted["pretrained"], []
    options = {"revision": wanted.get("revision"), "trust_remote_code": bool(wanted.get("trust_remote_code"))}
    peft = dict(wanted["peft"]) if wanted.get("peft") else None
    try:
        config = transformers.AutoConfig.from_pretrained(place, **options)
        changes.append(f"model.pretrained: random weights for those of {place}")
    except (OSError, ValueError) as error:
        family = guess_family(place, task, (peft or {}).get("target_modules"), _families(task))
        config = transformers.AutoConfig.for_model(family)
        changes.append(f"model.pretrained: {place} {why(error)}; a random {family} takes its place")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    ids |= {"pad_token_id": padding(tokenizer), "vocab_size": len(tokenizer)}
    if task == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        ids["decoder_start_token_id"] = padding(tokenizer)
    known = {**config.to_dict(), **ids}
    small, sizes = shrink(known, known, lambda values: runs(lambda: type(config)(**values), task))
    torch.manual_seed(0)
    model = getattr(transformers, TASKS[task].auto_class).from_config(type(config)(**small))
    model.save_pretrained(folder)
    if sizes:
        changes.append(f"model: {', '.join(sizes)}")
    section: dict[str, Any] = {"pretrained": str(folder)}
    if peft is not None:
        section["peft"] = peft
        wrong = _missing_modules(model, peft.get("target_modules"))
        if wrong:
            peft["target_modules"] = "all-linear"
            peft["fan_in_fan_out"] = any(type(module).__name__ == "Conv1D" for module in model.modules())
            changes.append(f"model.peft.target_modules: all-linear, as {type(model).__name__} has no {wrong}")
    return section, changes


def small_config(config: dict[str, Any], task: str, vocabulary: int = VOCABULARY) -> tuple[dict[str, Any], list[str]]:
    """A recipe's ``model.config`` with small sides, and the changes."""
    from transformers import AutoConfig

    more = {"pad_token_id": 0, **({"decoder_start_token_id": 0} if task == "seq2seq" else {})}

    def works(values: dict[str, Any]) -> bool:
        return runs(lambda: AutoConfig.for_model(**{**more, **values, "vocab_size": vocabulary}), task)

    return shrink(config, AutoConfig.for_model(**config).to_dict(), works)


def runs(make_config: Callable[[], Any], task: str) -> bool:
    """Whether a model of a config is small, can be made, and reads a few tokens."""
    import torch
    import transformers

    make = getattr(transformers, TASKS[task].auto_class).from_config
    try:
        config = make_config()
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in make(config).parameters()) > _LARGEST:
                return False
        model = make(config).eval()
        ids = torch.full((1, 8), 5)
        ids[0, -1] = next(iter(_ends(config)), 5)
        with torch.no_grad():
            mask = torch.ones_like(ids)
            model(input_ids=ids, attention_mask=mask, **({"labels": ids} if task == "seq2seq" else {}))
    except Exception:  # a config's or a model's own assertions, or those of its layers
        return False
    return True


def _ends(config: Any) -> list[int]:
    """The token that ends a text, which some classifiers look for."""
    end = getattr(config, "eos_token_id", None)
    return [end] if isinstance(end, int) and 0 <= end < config.vocab_size else []


def _families(task: str) -> set[str]:
    from transformers.models.auto import modeling_auto as auto

    names = {
        "classify": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked-lm": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    return set(names.get(task, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def _missing_modules(model: Any, targets: Any) -> str | None:
    """Names of `target_modules` that no module of `model` has."""
    if not targets or isinstance(targets, str):
        return None
    have = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [name for name in targets if name.rpartition(".")[2] not in have]
    return ", ".join(missing) or None

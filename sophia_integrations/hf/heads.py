"""The table of Hugging Face heads: which readout (likelihood and row alignment) belongs to which model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..curvature import Readout
from .readouts import (
    CausalLMReadout,
    ClassificationReadout,
    HeadReadout,
    QuestionAnsweringReadout,
    Seq2SeqReadout,
    base_model,
)


@dataclass(frozen=True)
class Head:
    """One row of the table.

    Attributes:
        task: its name in messages.
        readout: makes the readout, from the transformers model and the trained one (PEFT's wrapper, or the same).
        mappings: the auto-model mappings of transformers whose classes compute this loss.
        classes: further classes that do, whatever mapping they are in.
        loss_type: the name of the loss, for classes outside of transformers; transformers derives it from theirs.
        encoder_decoder: what `config.is_encoder_decoder` must be; None when either will do.
    """

    task: str
    readout: Callable[[nn.Module, nn.Module], Readout]
    mappings: tuple[str, ...] = ()
    classes: frozenset[str] = frozenset()
    loss_type: str | None = None
    encoder_decoder: bool | None = None


_OTHER_LOSSES = frozenset(
    "GitForCausalLM MusicgenForCausalLM MusicgenMelodyForCausalLM ProphetNetForCausalLM "
    "ProphetNetForConditionalGeneration Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM "
    "DeiTForImageClassificationWithTeacher LevitForImageClassificationWithTeacher LxmertForQuestionAnswering "
    "ShieldGemma2ForImageClassification PPLCNetForImageClassification".split()
)
"""Classes in the mappings below whose loss is another one, or none."""

_UNSHIFTED_CAUSAL = frozenset(
    "BartForCausalLM BigBirdPegasusForCausalLM BlenderbotForCausalLM BlenderbotSmallForCausalLM CpmAntForCausalLM "
    "MBartForCausalLM MarianForCausalLM MvpForCausalLM PLBartForCausalLM PegasusForCausalLM TrOCRForCausalLM "
    "WhisperForCausalLM XLMWithLMHeadModel XLNetLMHeadModel".split()
)
"""Decoders whose own loss takes labels that the caller has already moved (read from transformers 5.23)."""

HEADS = (
    Head("causal language modelling, labels moved by the caller", lambda *_: HeadReadout(), classes=_UNSHIFTED_CAUSAL),
    Head(
        "causal language modelling",
        lambda base, model: CausalLMReadout(virtual_tokens=_virtual_tokens(model)),
        ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
        loss_type="ForCausalLM",
        encoder_decoder=False,
    ),
    Head(
        "sequence to sequence",
        lambda *_: Seq2SeqReadout(),
        ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
        frozenset(
            "SpeechEncoderDecoderModel Speech2TextForConditionalGeneration VisionEncoderDecoderModel "
            "WhisperForConditionalGeneration".split()
        ),
        encoder_decoder=True,
    ),
    Head(
        "masked language modelling",
        lambda *_: HeadReadout(),
        ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
        encoder_decoder=False,
    ),
    Head("token classification", lambda *_: HeadReadout(), ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",)),
    Head(
        "sequence, image and video classification or regression",
        lambda base, _: ClassificationReadout(base.config),
        (
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
            "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
            "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
        ),
    ),
    Head("multiple choice", lambda *_: HeadReadout(), ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",)),
    Head(
        "question answering",
        lambda *_: QuestionAnsweringReadout(),
        ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",),
    ),
)
"""The first row that names a model's class is its row."""


def resolve_readout(model: nn.Module) -> Readout | None:
    """The readout for a transformers (or PEFT) model; None for a module that is neither.

    Raises:
        ValueError: a transformers model whose loss has no readout here.
    """
    from transformers import PreTrainedModel

    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        return None
    names = _names(base)
    if not names & _OTHER_LOSSES:
        for recognises in (_by_class, _by_loss_type):
            for head in HEADS:
                fits = head.encoder_decoder in (None, base.config.is_encoder_decoder)
                if fits and recognises(head, base, names):
                    return head.readout(base, model)
    raise ValueError(
        f"Sophia does not know the loss of {type(base).__name__}; it knows {'; '.join(h.task for h in HEADS)}. For "
        "another loss pass optimizers=(SophiaG(model.parameters(), lr=…, estimator=GaussNewtonBartlett(model, "
        "readout=…)), None) to the Trainer, with a Readout that names the likelihood and aligns the labels."
    )


def _names(base: nn.Module) -> set[str]:
    """The classes whose loss `base` computes: its own, and the ancestors that share its forward."""
    cls = type(base)
    return {c.__name__ for c in cls.__mro__ if c is cls or getattr(c, "forward", None) is cls.forward}


def _by_class(head: Head, base: nn.Module, names: set[str]) -> bool:
    from transformers.models.auto import modeling_auto

    if names & head.classes:
        return True
    values = [v for mapping in head.mappings for v in getattr(modeling_auto, mapping, {}).values()]
    return any(not names.isdisjoint((v,) if isinstance(v, str) else v) for v in values)


def _by_loss_type(head: Head, base: nn.Module, names: set[str]) -> bool:
    # Before transformers 4.47 a model does not have the attribute yet; the class name decides there as well.
    loss_type = getattr(base, "loss_type", None) or type(base).__name__
    return head.loss_type is not None and loss_type.endswith(head.loss_type)


def _virtual_tokens(model: nn.Module) -> int:
    """Positions that PEFT's prompt tuning puts before the tokens, and so before the logits.

    Raises:
        ValueError: a kind of prompt learning whose logits have another layout.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return 0
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind == "PREFIX_TUNING":
        return 0
    if kind in ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"):
        return config.num_virtual_tokens
    raise ValueError(f"Sophia does not know where {kind} of PEFT puts its logits: use LoRA or prompt tuning.")

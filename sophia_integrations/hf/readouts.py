"""Readouts of Hugging Face heads: what each is called with, and how labels line up with its predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..curvature import Bernoulli, Categorical, Gaussian, Likelihood, Product, Readout
from ..curvature.likelihood import IGNORE_INDEX
from ..curvature.readout import bound_arguments
from ..curvature.rows import select, take_rows
from ..curvature.tap import MicroBatch
from ..curvature.witness import Witness, listen_to_log_probabilities


class HeadReadout(Readout):
    """Labels line up with the predictions as they are; the pass calls the model without them.

    It is right for masked language models, token classification and multiple choice, whose losses are the mean
    cross-entropy over the labels that are not -100. An auxiliary loss that the model adds (the load balancing of a
    mixture of experts) is not a likelihood and not part of ĥ.
    """

    label_arguments: tuple[str, ...] = ("labels",)
    batch_arguments = ("num_items_in_batch", "fused_lm_head")
    shared_arguments = ("cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask")
    """Tensors that have no rows of the batch, however long their dimension 0 is."""

    rows_are_known = True
    class_dim = -1

    def num_rows(self, model: nn.Module, batch: MicroBatch) -> int | None:
        named = bound_arguments(model, batch)
        main = named.get(getattr(base_model(model), "main_input_name", None))
        if self._rows is None and self.batch_dim is not None and isinstance(main, Tensor):
            return main.shape[self.batch_dim]
        return super().num_rows(model, self._without_shared(batch))

    def rows(self, model: nn.Module, batch: MicroBatch, index: Tensor) -> MicroBatch:
        size = self.num_rows(model, batch)
        if self._rows is not None or len(index) == size:
            return super().rows(model, batch, index)
        part = take_rows(self._without_shared(batch), index, self.batch_dim, size)
        kwargs = {**batch.kwargs, **part.kwargs}
        positions = batch.kwargs.get("position_ids")
        if isinstance(positions, Tensor) and positions.ndim == 3:  # one number for each axis: [axes, rows, tokens]
            kwargs["position_ids"] = select(positions, index, 1, size)
        return replace(part, kwargs=kwargs)

    def _without_shared(self, batch: MicroBatch) -> MicroBatch:
        return replace(batch, kwargs={k: v for k, v in batch.kwargs.items() if k not in self.shared_arguments})

    def inputs(self, model: nn.Module, batch: MicroBatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        left_out = (*self.label_arguments, *self.batch_arguments)
        return (), {k: v for k, v in bound_arguments(model, batch).items() if k not in left_out}

    def labels(self, model: nn.Module, batch: MicroBatch) -> Any:
        labels = super().labels(model, batch)
        if labels is None:
            raise ValueError(_no_labels(model))
        return labels

    def listen(self, model: nn.Module, output: Any, batch: MicroBatch, seed: int) -> Witness | None:
        log_probs = output.get("log_probs") if isinstance(output, dict) else getattr(output, "log_probs", None)
        if self.check and isinstance(log_probs, Tensor):  # of TRL's fused head, which makes no logits
            return listen_to_log_probabilities(log_probs)
        return super().listen(model, output, batch, seed)


class CausalLMReadout(HeadReadout):
    """Causal language models: logits at position t predict the label at t + 1, so labels move one to the left.

    Args:
        virtual_tokens: trained positions that PEFT puts before the input (prompt tuning); they carry no label.
        options: as for `Readout`.
    """

    label_arguments = ("labels", "shift_labels")

    def __init__(self, likelihood: Likelihood | None = None, virtual_tokens: int = 0, **options: Any) -> None:
        super().__init__(likelihood, **options)
        self.virtual_tokens = virtual_tokens

    def labels(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        shifted = bound_arguments(model, batch).get("shift_labels")
        if shifted is not None:
            return F.pad(shifted, (self.virtual_tokens, 0), value=IGNORE_INDEX)
        labels = F.pad(super().labels(model, batch), (self.virtual_tokens, 1), value=IGNORE_INDEX)
        return labels[..., 1:]


class Seq2SeqReadout(HeadReadout):
    """Encoder-decoders: the decoder's *input* is the labels moved to the right, the labels themselves stay.

    Without labels such a model has no decoder input, so it is made from them first, by the model's own method where
    it has one; otherwise the labels stay in the call and the loss that comes with them is not used.
    """

    def inputs(self, model: nn.Module, batch: MicroBatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = bound_arguments(model, batch)
        args, kwargs = super().inputs(model, batch)
        if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
            labels = self.labels(model, batch)
            prepare = getattr(base_model(model), "prepare_decoder_input_ids_from_labels", None)
            if prepare is not None:
                kwargs["decoder_input_ids"] = prepare(labels=labels)
            elif named.get("labels") is not None:
                kwargs["labels"] = labels
        return args, kwargs


class ClassificationReadout(HeadReadout):
    """Sequence, image and video classification: the likelihood follows `config.problem_type`, as the loss does."""

    def __init__(self, config: Any) -> None:
        super().__init__(ProblemTypeLikelihood(config))

    def softmax(self, labels: Any | None) -> Categorical | None:
        of = getattr(self.likelihood, "part", None)
        part = of(labels) if of is not None and labels is not None else None
        return part if isinstance(part, Categorical) else None


class ProblemTypeLikelihood:
    """Categorical, Bernoulli (multi-label) or Gaussian (regression), by the rule of transformers' own loss.

    `problem_type` decides when the config has one; the model writes it there with its first loss. Otherwise one
    output is a regression, whole-number labels are classes, and other labels are independent yes/no outcomes
    (transformers/loss/loss_utils.py, `ForSequenceClassificationLoss`). The regression loss is the mean squared error
    without ½ in front, hence a variance of ½.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._parts: dict[str, Likelihood] = {
            "single_label_classification": Categorical(),
            "multi_label_classification": Bernoulli(),
            "regression": Gaussian(0.5),
        }

    def sample(self, prediction: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return self.part(labels).sample(prediction, labels, generator)

    def nll_sum(self, prediction: Tensor, sampled: Tensor) -> Tensor:
        return self.part(sampled).nll_sum(prediction, sampled)

    def count(self, prediction: Tensor | None, labels: Tensor) -> Tensor | int:
        return self.part(labels).count(prediction, labels)

    def part(self, labels: Tensor) -> Likelihood:
        """The likelihood of these labels."""
        kind = self._config.problem_type
        if kind is None and self._config.num_labels == 1:
            kind = "regression"
        elif kind is None:
            whole = labels.dtype in (torch.int64, torch.int32)
            kind = "single_label_classification" if whole else "multi_label_classification"
        return self._parts[kind]


class QuestionAnsweringReadout(HeadReadout):
    """Extractive question answering: a start and an end, each a class among the positions of its row.

    As in transformers' loss, a negative position counts as 0 and one beyond the input does not count.
    """

    label_arguments = ("start_positions", "end_positions")

    def __init__(self) -> None:
        super().__init__(Product(Categorical(), Categorical()))

    def labels(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        named = bound_arguments(model, batch)
        if any(named.get(name) is None for name in self.label_arguments):
            raise ValueError(_no_labels(model, " and ".join(self.label_arguments)))
        tokens = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
        return tuple(_positions(named[name], tokens.shape[1]) for name in self.label_arguments)

    def predictions(self, output: Any, labels: tuple[Tensor, Tensor], batch: MicroBatch) -> tuple[tuple, tuple]:
        logits = (output["start_logits"], output["end_logits"])
        return logits, tuple(self._inside(y.to(f.device), f) for y, f in zip(labels, logits, strict=True))

    def _inside(self, labels: Tensor, logits: Tensor) -> Tensor:
        return labels.masked_fill(labels >= logits.shape[1], IGNORE_INDEX)


def _positions(labels: Tensor, length: int) -> Tensor:
    """[rows] positions from labels [rows] or [rows, 1]; -100 marks what lies beyond `length`."""
    labels = labels.squeeze(-1) if labels.ndim > 1 else labels
    return labels.clamp(min=0).masked_fill(labels >= length, IGNORE_INDEX)


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, looking through PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _no_labels(model: nn.Module, names: str = "labels") -> str:
    return (
        f"no {names} reached {type(model).__name__}, so Sophia cannot tell which predictions count: pass them to the "
        "model, or call estimator.note_labels(labels) before each forward. A loss that is not a likelihood of labels "
        "(DPO, GRPO, a reward model's) has no Gauss-Newton-Bartlett estimate: pass optimizers=(SophiaH(…, "
        "estimator=Hutchinson(model, loss=…)), None) with that loss as a function of the model's output."
    )

"""One tiny model for each row of the table of heads, four rows of data, and its loss written out by hand.

`loss(model, row)` returns the summed loss of one row at the labels of `drawn`, and how many predictions it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf

VOCABULARY, LENGTH, CLASSES, ROWS = 31, 9, 4, 4
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def drawn(labels, classes):
    """The labels that the test "draws": a function of the real ones, so that a reference can know them."""
    return 1 - labels if labels.is_floating_point() else (labels * 7 + 3) % classes


class FixedDraws:
    """A likelihood that draws by `drawn`; everything else is the wrapped one's."""

    def __init__(self, wrapped):
        self.nll_sum, self.count = wrapped.nll_sum, wrapped.count

    def sample(self, prediction, labels, generator):
        if isinstance(labels, tuple):
            return tuple(self.sample(f, y, generator) for f, y in zip(prediction, labels, strict=True))
        return drawn(labels, prediction.shape[1]).where(labels != -100, labels)


@dataclass
class Case:
    build: Callable[[], Any]
    rows: Callable[[torch.Generator], list[dict[str, torch.Tensor]]]
    loss: Callable[[Any, dict[str, torch.Tensor]], tuple[torch.Tensor, int]]
    whole_batch: bool = False


def no_dropout(config):
    for key, value in config.to_dict().items():
        if ("drop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def bert(kind, **config):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    config = hf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes, **config)
    return getattr(hf, f"BertFor{kind}")(no_dropout(config))


def classifier():
    torch.manual_seed(0)
    return bert("SequenceClassification", num_labels=3)


def rows_for(model, rows=8):
    """Rows for a classifier or a language model, with as many labels in each, so that the mean of means is the mean."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCABULARY, (6,), generator=generator) for _ in range(rows)]
    one_label = model.config.model_type == "bert"
    return [{"input_ids": x, "labels": torch.tensor(row % 3) if one_label else x} for row, x in enumerate(ids)]


def t5():
    sizes = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return hf.T5ForConditionalGeneration(
        no_dropout(
            hf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **sizes)
        )
    )


def bart_like(config_class, model_class, **extra):
    sizes = dict(d_model=16, max_position_embeddings=32, vocab_size=VOCABULARY)
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24}
    return model_class(no_dropout(config_class(decoder_start_token_id=2, **sizes, **{**IDS, **extra})))


def whisper():
    sizes = dict(num_mel_bins=4, max_source_positions=8, max_target_positions=16, d_model=16, vocab_size=VOCABULARY)
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24}
    return hf.WhisperForConditionalGeneration(no_dropout(hf.WhisperConfig(decoder_start_token_id=2, **sizes, **IDS)))


def image_to_text():
    sizes = dict(is_decoder=True, add_cross_attention=True, n_layer=1, n_head=2, n_embd=16, n_positions=16)
    decoder = no_dropout(hf.GPT2Config(vocab_size=VOCABULARY, **sizes, **IDS))
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit().config, decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    return hf.VisionEncoderDecoderModel(config)


def mixtral():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = hf.MixtralConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=3, output_router_logits=True, **sizes, **IDS
    )
    config.router_aux_loss_coef = 0.5
    return hf.MixtralForCausalLM(config)


def vit():
    config = hf.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    config.num_labels = CLASSES
    return hf.ViTForImageClassification(no_dropout(config))


def resnet():
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    config.num_labels = CLASSES
    return hf.ResNetForImageClassification(config)


def token_rows(generator, labels):
    rows = []
    for row in range(ROWS):
        ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)
        rows.append({"input_ids": ids, "labels": labels(ids, row, generator)})
    return rows


def prompt_masked(ids, row, _):
    return torch.cat([torch.full((2 + row,), -100), ids[2 + row :]])


def scattered(ids, row, _):
    return ids.where(torch.arange(LENGTH) % (2 + row) == 0, -100)


def targets(ids, row, generator):
    labels = torch.randint(3, VOCABULARY, (5,), generator=generator)
    labels[5 - row :] = -100
    return labels


def summed(logits, labels):
    """Σ of the cross-entropy at the drawn labels, position by position; logits and labels belong together."""
    total, count = 0.0, 0
    for f, y in zip(logits, labels, strict=True):
        if y != -100:
            total = total - F.log_softmax(f.float(), -1)[drawn(y, len(f))]
            count += 1
    return total, count


def causal(model, row):
    return summed(model(input_ids=row["input_ids"][None]).logits[0, :-1], row["labels"][1:])


def unmoved(model, row):
    return summed(model(input_ids=row["input_ids"][None]).logits[0], row["labels"])


def decoder_from(start):
    def loss(model, row):
        before = row["labels"].where(row["labels"] != -100, IDS["pad_token_id"])[:-1]
        decoder = torch.cat([torch.tensor([start]), before])
        inputs = {k: v[None] for k, v in row.items() if k not in ("labels", "decoder_input_ids")}
        output = model(**inputs, decoder_input_ids=decoder[None])
        return summed(output.logits[0], row["labels"])

    return loss


def one_class(model, row):
    inputs = {k: v[None] for k, v in row.items() if k != "labels"}
    return summed(model(**inputs).logits, row["labels"][None])


def multi_label(model, row):
    p = model(input_ids=row["input_ids"][None]).logits[0].sigmoid()
    y = drawn(row["labels"], None)
    return -(y * p.log() + (1 - y) * (1 - p).log()).sum(), y.numel()


def squared_error(model, row):
    f = model(input_ids=row["input_ids"][None]).logits[0]
    y = drawn(row["labels"], None)
    return ((f - y) ** 2).sum(), f.numel()


def start_and_end(model, row):
    output = model(input_ids=row["input_ids"][None])
    start, n = summed(output.start_logits, row["start_positions"][None])
    inside = row["end_positions"] if row["end_positions"] < LENGTH else torch.tensor(-100)
    end, m = summed(output.end_logits, inside[None])
    return start + end, n + m


def question_rows(generator):
    rows = token_rows(generator, lambda *_: None)
    for number, row in enumerate(rows):
        del row["labels"]
        row["start_positions"] = torch.tensor(number)
        row["end_positions"] = torch.tensor((3, 5, 8, LENGTH + 2)[number])
    return rows


def heard_or_seen(name, *shape):
    def rows(generator):
        found = token_rows(generator, targets)
        return [{name: torch.randn(shape, generator=generator), "labels": row["labels"]} for row in found]

    return rows


def class_rows(generator, shape=None):
    rows = token_rows(generator, lambda ids, row, g: torch.tensor(row % CLASSES))
    if shape is not None:
        rows = [{"pixel_values": torch.randn(shape, generator=generator), "labels": r["labels"]} for r in rows]
    return rows


def choice_rows(generator):
    ids = torch.randint(3, VOCABULARY, (ROWS, 3, LENGTH), generator=generator)
    return [{"input_ids": ids[row], "labels": torch.tensor(row % 3)} for row in range(ROWS)]


def float_rows(*shape, yes_no=False):
    def labels(ids, row, generator):
        values = torch.randn(shape, generator=generator)
        return (values > 0).float() if yes_no else values

    return lambda generator: token_rows(generator, labels)


def rows_of(labels):
    return lambda generator: token_rows(generator, labels)


def tags(ids, row, _):
    return (ids % CLASSES).where(torch.arange(LENGTH) > row, -100)


BART, M2M = (hf.BartConfig, hf.BartForConditionalGeneration), (hf.M2M100Config, hf.M2M100ForConditionalGeneration)
CASES = {
    "mixtral": Case(mixtral, rows_of(prompt_masked), causal),
    "bart-decoder": Case(
        lambda: bart_like(hf.BartConfig, hf.BartForCausalLM, is_decoder=True), rows_of(prompt_masked), unmoved
    ),
    "t5": Case(t5, rows_of(targets), decoder_from(0)),
    "bart": Case(lambda: bart_like(*BART), rows_of(targets), decoder_from(2)),
    "m2m100": Case(lambda: bart_like(*M2M), rows_of(targets), decoder_from(2)),
    "whisper": Case(whisper, heard_or_seen("input_features", 4, 16), decoder_from(2)),
    "image-to-text": Case(image_to_text, heard_or_seen("pixel_values", 3, 8, 8), decoder_from(2)),
    "masked-lm": Case(lambda: bert("MaskedLM"), rows_of(scattered), unmoved),
    "token-classification": Case(lambda: bert("TokenClassification", num_labels=CLASSES), rows_of(tags), unmoved),
    "single-label": Case(lambda: bert("SequenceClassification", num_labels=CLASSES), class_rows, one_class),
    "multi-label": Case(
        lambda: bert("SequenceClassification", num_labels=CLASSES), float_rows(CLASSES, yes_no=True), multi_label
    ),
    "regression": Case(lambda: bert("SequenceClassification", num_labels=1), float_rows(), squared_error),
    "regression-of-3": Case(
        lambda: bert("SequenceClassification", num_labels=3, problem_type="regression"), float_rows(3), squared_error
    ),
    "multiple-choice": Case(lambda: bert("MultipleChoice"), choice_rows, one_class),
    "question-answering": Case(lambda: bert("QuestionAnswering"), question_rows, start_and_end),
    "vit": Case(vit, lambda g: class_rows(g, (3, 8, 8)), one_class),
    "resnet": Case(resnet, lambda g: class_rows(g, (3, 16, 16)), one_class, whole_batch=True),
}

"""Fine-tuning in Lightning: prompts carry no loss, batches are padded or packed, and only answers are learnt."""

import json

import lightning.pytorch as pl
import pytest
import torch
from tiny_language import save_tiny_chat_model, sentence, write_chats
from workers.lightning_support import FILTERS, Record, hessian_of, make_trainer, sophia_of

from sophia_integrations import SophiaG
from sophia_integrations.curvature import Categorical
from sophia_integrations.lightning import CausalLM, SophiaCallback, TextDataModule

pytestmark = [
    *[pytest.mark.filterwarnings(f) for f in FILTERS],
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
ROWS = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained model and its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_chat_model(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "train.jsonl"
    write_chats(path, ROWS)
    return path


@pytest.fixture
def options(base, tmp_path):
    return dict(
        tokenizer=str(base), task="finetune", block_size=24, validation_fraction=0.2, cache_dir=str(tmp_path / "cache")
    )


def prepared(*args, **options):
    data = TextDataModule(*args, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def test_of_a_chat_only_the_answers_carry_loss(chats, options):
    data = prepared([str(chats)], batch_size=6, **options)
    batch = next(iter(data.train_dataloader()))
    rows, longest = batch["input_ids"].shape
    assert rows == 6 and batch["attention_mask"].shape == batch["labels"].shape == (6, longest)
    answers = {sentence(number + 5, 4) for number in range(ROWS)}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        learned = data.tokenizer_object.decode(ids[labels != -100])
        assert learned.removesuffix(" </s>") in answers
        assert (labels[mask == 0] == -100).all() and (labels[labels != -100] == ids[labels != -100]).all()
    assert len({int(mask.sum()) for mask in batch["attention_mask"]}) > 1


def test_columns_with_other_names(base, options, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"question": sentence(number, 5), "answer": sentence(number + 1, 3)} for number in range(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = {"prompt": "question", "completion": "answer"}
    data = prepared([str(path)], columns=columns, **options)
    assert data.prepared.layout == "rows"
    item = data.prepared.train[0]
    assert int((item["labels"] != -100).sum()) == 4  # three words and the end


def test_packed_examples_do_not_see_each_other(chats, options):
    data = prepared([str(chats)], packing=True, batch_size=2, **options)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (2, 24) and "attention_mask" not in batch
    assert int((batch["position_ids"] == 0).sum()) > 2


def test_a_folder_with_a_data_set_is_read_like_a_hub(chats, options):
    hub = prepared(hub={"path": str(chats.parent), "split": "train"}, **options)
    files = prepared([str(chats)], **options)
    for a, b in zip(hub.prepared.train, files.prepared.train, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["labels"], b["labels"])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("peft", "share"),
    [(None, 0.9), ({"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}, 0.99)],
    ids=["full", "LoRA"],
)
def test_a_chat_is_learnt(base, chats, options, peft, share, packing):
    def sophia(params):
        return SophiaG(params, lr=2e-2, rho=0.1, betas=(0.8, 0.9), eps=1e-4, hessian_interval=5)

    torch.manual_seed(0)
    module = CausalLM(pretrained=str(base), optimizer=sophia, warmup_steps=2, schedule="linear", peft=peft)
    data, record = TextDataModule([str(chats)], batch_size=4, packing=packing, **options), Record()
    trainer = make_trainer(record, sophia=SophiaCallback(), max_steps=30, gradient_clip_val=1.0, val_check_interval=1.0)
    trainer.fit(module, data)
    assert sum(record.losses[-5:]) < share * sum(record.losses[:5])
    assert sophia_of(trainer).stats()["hessian_updates"] == 6
    assert float(trainer.callback_metrics["val_loss"]) < record.losses[0]
    assert len(sophia_of(trainer).state) == sum(p.requires_grad for p in module.parameters())


def test_padding_and_prompts_are_no_predictions_of_the_estimate(base, chats, options):
    """ĥ of a padded batch is that of its rows one by one."""

    class WordByWord(Categorical):
        def sample(self, prediction, labels, generator):
            return torch.where(labels == -100, -100, (labels * 7 + 3) % prediction.shape[-1])

    class Draw(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            sophia_of(trainer).estimator.readout.likelihood = WordByWord()

    hessians = []
    for rows, steps in ((8, 1), (1, 8)):
        torch.manual_seed(0)
        module = CausalLM(pretrained=str(base), optimizer=lambda params: SophiaG(params, lr=1e-3), schedule="constant")
        data = TextDataModule([str(chats)], batch_size=rows, **options)
        trainer = make_trainer(Draw(), accumulate_grad_batches=steps)
        trainer.fit(module, data)
        hessians.append(hessian_of(trainer, module))
    for name, h in hessians[0].items():
        torch.testing.assert_close(h, hessians[1][name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hub": {"path": "somewhere"}}, "reads files or hub: give one of them"),
        ({"files": None, "hub": {"name": "main"}}, "hub needs a path"),
    ],
)
def test_sources_that_exclude_each_other(chats, options, changed, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**{"files": [str(chats)], **options, **changed})


def test_a_pretrained_model_with_another_tokenizer_is_refused(base, tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(sentence(number, 200))
    module = CausalLM(pretrained=str(base), optimizer=SophiaG)
    module.model.config.vocab_size = 1000
    data = TextDataModule(
        [str(tmp_path / "*.txt")], vocab_size=300, block_size=8, validation_fraction=0.3, cache_dir=str(tmp_path)
    )
    with pytest.raises(ValueError, match="knows its own tokens only: give TextDataModule its tokenizer, tokenizer="):
        make_trainer(max_steps=1).fit(module, data)

"""LoRA in Lightning: only the adapters are trained and estimated, in `CausalLM` and in a module of the user."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from support import fixed_labels, tiny_model, token_rows
from workers.lightning_support import (
    FILTERS,
    TINY,
    Draw,
    LanguageModel,
    Record,
    hessian_of,
    make_trainer,
    sophia_of,
    token_loader,
)

from sophia_integrations import SophiaG
from sophia_integrations.lightning import CausalLM, SophiaCallback

pytestmark = [
    *[pytest.mark.filterwarnings(f) for f in FILTERS],
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


def by_hand(model, rows):
    """Σ over rows of S² / N of the trainable parameters, at the labels of `Draw`."""
    model = copy.deepcopy(model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums, count = {n: torch.zeros_like(p) for n, p in named.items()}, 0
    for row in rows:
        logits, targets = model(input_ids=row["input_ids"][None]).logits[0, :-1], row["labels"][1:]
        targets = torch.where(targets == -100, -100, fixed_labels(targets))
        count += int((targets != -100).sum())
        loss = F.cross_entropy(logits, targets, reduction="sum")
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            sums[name] += g.square()
    return {name: s / count for name, s in sums.items()}


def test_adapters_in_a_module_of_the_user():
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, "lora_dropout": 0.0}, init_lora_weights=False)
    module = LanguageModel(peft.get_peft_model(tiny_model("llama"), config))
    expected = by_hand(module.model, token_rows()[:8])
    trainer = make_trainer(Draw(), accumulate_grad_batches=2)
    trainer.fit(module, token_loader(4))
    h = hessian_of(trainer, module)
    assert h.keys() == {f"model.{name}" for name in expected} and len(h) == 8
    for name, value in expected.items():
        torch.testing.assert_close(h[f"model.{name}"], value, rtol=1e-5, atol=1e-9)
        assert value.max() > 0


@pytest.fixture
def base(tmp_path):
    """A pretrained model in a folder, with weights in bfloat16 as the hub's often are."""
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base):
    torch.manual_seed(0)
    return CausalLM(
        pretrained=str(base),
        optimizer=lambda params: SophiaG(params, lr=1e-2, rho=0.1, betas=(0.9, 0.9), hessian_interval=3),
        schedule="constant",
        peft=LORA,
    )


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_causal_lm_trains_and_keeps_adapters_only(base, tmp_path):
    def fit(steps, record, checkpoint=None):
        module = adapted(base)
        saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=6, save_top_k=-1)
        options = dict(sophia=SophiaCallback(), max_steps=steps, enable_checkpointing=True)
        trainer = make_trainer(record, saver, **options)
        trainer.fit(module, token_loader(rows=24), ckpt_path=checkpoint)
        return trainer, module

    straight, resumed = Record(), Record()
    trainer, module = fit(12, straight)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all("lora_" in name for name in trained)
    assert {id(p) for p in sophia_of(trainer).state} == {id(p) for p in trained.values()}
    assert sophia_of(trainer).stats()["hessian_updates"] == 4
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    before = dict(adapted(base).named_parameters())
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained)
    assert sum(straight.losses[-6:]) < sum(straight.losses[:6])

    saved = torch.load(tmp_path / "saved" / "step=6.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == trained.keys()
    _, again = fit(12, resumed, str(tmp_path / "saved" / "step=6.ckpt"))
    assert resumed.losses == straight.losses[6:]
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_new_model_with_adapters_is_saved_whole(tmp_path):
    module = CausalLM(TINY, peft={"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True})
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, token_loader())
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    saved = torch.load(tmp_path / "all.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.state_dict().keys()


def test_an_unknown_word_names_the_nearest():
    with pytest.raises(ValueError, match="peft.LoraConfig, which has no 'lora_alfa'; did you mean lora_alpha"):
        CausalLM(TINY, peft={"lora_alfa": 4})

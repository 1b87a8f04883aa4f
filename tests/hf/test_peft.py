"""PEFT under a plain Trainer: adapters only are estimated, and prompt tuning's longer logits meet their labels."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from support import assert_trained, first_hessian, make_trainer, sophia_of, tiny_model, token_rows
from tiny_heads import CASES, FixedDraws, drawn

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
ROWS, BETA2, VIRTUAL = 4, 0.99, 3


def lora(task, modules, **options):
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules, task_type=task, lora_dropout=0.0, **options)


def prompts(kind):
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    return config(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)


def adapted(config, model=None):
    torch.manual_seed(3)
    model = peft.get_peft_model(model or tiny_model("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def one_step(tmp_path, model, rows):
    trainer = make_trainer(tmp_path, model=model, data=rows, max_steps=1, logging_steps=1)
    trainer.create_optimizer()
    readout = trainer.optimizer.estimator.readout
    readout.likelihood = FixedDraws(readout.likelihood)
    trainer.train()
    assert sophia_of(trainer).stats()["hessian_updates"] == 1
    return first_hessian(trainer)


def by_hand(model, rows, logits_of, shift):
    model = copy.deepcopy(model).train()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total, count = {n: 0.0 for n in named}, 0
    for row in rows:
        logits, loss = logits_of(model, row), 0.0
        for f, y in zip(logits[:-1] if shift else logits, row["labels"][1:] if shift else row["labels"], strict=True):
            if y != -100:
                loss, count = loss + F.cross_entropy(f.float(), drawn(y, len(f))), count + 1
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            total[name] = total[name] + g.square()
    return {name: (1 - BETA2) * s / count for name, s in total.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= 1e-5 * value.abs().max() and value.abs().max() > 0, name


def test_lora_causal(tmp_path):
    rows, model = token_rows(ROWS), adapted(lora("CAUSAL_LM", ["q_proj", "down_proj"]))
    expected = by_hand(model, rows, lambda m, r: m(input_ids=r["input_ids"][None]).logits[0], shift=True)
    assert_same(one_step(tmp_path, model, rows), expected)


def test_lora_t5(tmp_path):
    case = CASES["t5"]
    rows = case.rows(torch.Generator().manual_seed(1))
    model = adapted(lora("SEQ_2_SEQ_LM", ["q", "v"]), case.build())

    def logits(m, row):
        decoder = torch.cat([torch.tensor([0]), row["labels"].clamp(min=0)[:-1]])
        return m(input_ids=row["input_ids"][None], decoder_input_ids=decoder[None]).logits[0]

    expected = by_hand(model, rows, logits, shift=False)
    assert_same(one_step(tmp_path, model, rows), expected)


def test_prompt_tuning(tmp_path):
    rows, model = token_rows(ROWS), adapted(prompts("prompt"))

    def logits(m, row):  # the last virtual token predicts the first token
        return m(input_ids=row["input_ids"][None]).logits[0, VIRTUAL - 1 : -1]

    expected = by_hand(model, rows, logits, shift=False)
    assert_same(one_step(tmp_path, model, rows), expected)


def test_prefix_tuning(tmp_path):
    rows, model = token_rows(ROWS), adapted(prompts("prefix"))
    expected = by_hand(model, rows, lambda m, r: m(input_ids=r["input_ids"][None]).logits[0], shift=True)
    assert_same(one_step(tmp_path, model, rows), expected)


ADAPTERS = {
    "lora": lambda: (lora("CAUSAL_LM", ["q_proj", "down_proj"]), None, token_rows(ROWS)),
    "lora-t5": lambda: (lora("SEQ_2_SEQ_LM", ["q", "v"]), CASES["t5"].build(), t5_rows()),
    "prompt": lambda: (prompts("prompt"), None, token_rows(ROWS)),
    "prefix": lambda: (prompts("prefix"), None, token_rows(ROWS)),
}


def t5_rows():
    return CASES["t5"].rows(torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ADAPTERS)
def test_short_training_moves_the_adapters_only(tmp_path, name):
    config, base, rows = ADAPTERS[name]()
    model = adapted(config, base)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = dict(max_steps=8, logging_steps=1, learning_rate=3e-2, optim_args="hessian_interval=3,beta1=0.8")
    assert_trained(make_trainer(tmp_path, model=model, data=rows, **options), updates=3)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad != torch.equal(parameter, before[parameter_name]), parameter_name


def test_an_unknown_kind_of_prompt_is_refused():
    model = adapted(prompts("prompt"))
    model.active_peft_config.peft_type = "CPT"
    from sophia_integrations import GaussNewtonBartlett

    with pytest.raises(ValueError, match="CPT of PEFT"):
        GaussNewtonBartlett(model)

"""TRL: what SFTTrainer does to batches and logits, and the trainers whose loss is no likelihood of labels."""

import pytest
import torch
import transformers
import trl
from support import assert_trained, sophia_of, tiny_model
from tiny_language import save_tiny_language_model, sentence

from sophia_integrations import GaussNewtonBartlett, SophiaG
from sophia_integrations.hf import SophiaTrainerMixin

pytestmark = [  # all of them are TRL and PEFT using each other's and transformers' older names
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_kwargs)?. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.(label_smoothing_factor|compute_loss_func).* is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-language")
    save_tiny_language_model(path)
    return str(path)


def sft(folder, output, rows=None, cls=None, **options):
    from datasets import Dataset

    trainer_options = {k: options.pop(k) for k in ("peft_config", "compute_loss_func") if k in options}
    defaults = dict(
        optim="sophia",
        optim_args="hessian_interval=3,beta1=0.8,hessian_fraction=1.0",
        learning_rate=1e-2,
        max_steps=8,
        per_device_train_batch_size=4,
        logging_steps=1,
        max_length=16,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    return (cls or trl.SFTTrainer)(
        folder,
        args=trl.SFTConfig(str(output), **{**defaults, **options}),
        train_dataset=Dataset.from_list(rows or [{"text": sentence(n)} for n in range(8)]),
        **trainer_options,
    )


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")


VARIANTS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "packing": {"packing": True, "max_length": 24, "per_device_train_batch_size": 1},
    "label-smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.filterwarnings("ignore:.*packing.*:UserWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_sft(folder, tmp_path, name):
    assert_trained(sft(folder, tmp_path, **VARIANTS[name]), updates=3)


def test_sft_prompt_completion_counts_the_completion_only(folder, tmp_path):
    rows = [{"prompt": sentence(n, 4), "completion": " " + sentence(n + 5, 3)} for n in range(8)]
    trainer = sft(folder, tmp_path, rows)
    estimates = []
    trainer.create_optimizer()
    estimator = trainer.optimizer.estimator
    original = estimator.estimate
    estimator.estimate = lambda *a: estimates.append(original(*a)) or estimates[-1]
    assert_trained(trainer, updates=3)
    assert [e.num_predictions for e in estimates] == [4 * 4] * 3  # rows × (3 words and the end of the text)


def test_sft_with_a_loss_of_the_user(folder, tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1], labels[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    assert_trained(sft(folder, tmp_path, compute_loss_func=loss), updates=3)


def test_sft_dynamic_fine_tuning_is_refused(folder, tmp_path):
    """Its weights are read from the log-probabilities of the fused head, which makes no logits."""
    with pytest.raises(ValueError, match="training loss is not the mean.*weighs one prediction.*Hutchinson"):
        sft(folder, tmp_path, loss_type="dft").train()


def test_sft_lora(folder, tmp_path):
    trainer = sft(folder, tmp_path, peft_config=lora())
    assert_trained(trainer, updates=3)
    trained = {id(p) for group in sophia_of(trainer).param_groups for p in group["params"]}
    assert trained == {id(p) for n, p in trainer.model.named_parameters() if "lora_" in n}


def test_sft_with_the_mixin(folder, tmp_path):
    class SophiaSFTTrainer(SophiaTrainerMixin, trl.SFTTrainer):
        pass

    assert_trained(sft(folder, tmp_path, cls=SophiaSFTTrainer), updates=3)


def test_sft_hutchinson(folder, tmp_path):
    assert_trained(sft(folder, tmp_path, optim="sophia_h"), updates=3)


def test_sft_first_estimate_does_not_depend_on_the_fused_head(folder, tmp_path):
    """The pass drops `fused_lm_head=True`; the same rows through a plain loop give the same ĥ."""
    trainer = sft(folder, tmp_path / "sft", max_steps=1, optim_args="hessian_fraction=1.0,hessian_units=64")
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(dict(k)) if m.training and not seen else None, with_kwargs=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    trainer.train()
    assert seen[0]["fused_lm_head"] is True
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=64, seed=trainer.args.seed)
    optimizer = SophiaG(model.parameters(), lr=1e-3, estimator=estimator)
    model(**{k: seen[0][k] for k in ("input_ids", "attention_mask", "labels")}).loss.backward()
    optimizer.step()
    for (name, plain), (other, fused) in zip(model.named_parameters(), trainer.model.named_parameters(), strict=True):
        h = optimizer.state[plain]["hessian"]
        assert name == other
        torch.testing.assert_close(sophia_of(trainer).state[fused]["hessian"], h, rtol=1e-4, atol=1e-6 * float(h.max()))


@pytest.mark.parametrize("name", ["DPOConfig", "GRPOConfig", "RewardConfig", "KTOConfig"])
@pytest.mark.parametrize("optim", ["sophia", "sophia_h"])
def test_a_loss_that_is_no_likelihood_is_refused_before_training(tmp_path, name, optim):
    args = getattr(trl, name)(str(tmp_path), optim=optim, use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=f"{name} trains another one.*Hutchinson"):
        transformers.Trainer.get_optimizer_cls_and_kwargs(args, tiny_model())

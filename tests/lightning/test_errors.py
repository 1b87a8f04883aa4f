"""What SophiaCallback refuses, and the sentence that says so."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import SingleDeviceStrategy
from support import VOCABULARY, Toy, tiny_model
from torch import nn
from workers.lightning_support import FILTERS, Classifier, LanguageModel, make_trainer, row_loader, token_loader

from sophia_integrations import GaussNewtonBartlett, SophiaG
from sophia_integrations.curvature import Readout
from sophia_integrations.lightning import SophiaCallback

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]


def refusal(module, trainer=None, loader=None):
    with pytest.raises(ValueError) as error:
        (trainer or make_trainer()).fit(module, loader or row_loader())
    return str(error.value)


class Bare(Classifier):
    sophia_logits = None

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_two_callbacks():
    assert "two SophiaCallbacks" in refusal(Classifier(), make_trainer(SophiaCallback()))


def test_no_sophia_optimizer():
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters())
    message = refusal(module)
    assert "no Sophia optimizer in Classifier" in message and "AdamW" in message and "return SophiaG(" in message


def test_two_sophia_optimizers():
    module = Classifier()
    module.automatic_optimization = False
    first, second = list(module.parameters())[:2], list(module.parameters())[2:]
    module.configure_optimizers = lambda: [SophiaG(first), SophiaG(second)]
    assert "serves one Sophia optimizer, and Classifier has 2" in refusal(module)


@pytest.mark.parametrize(
    ("name", "advice"), [("DeepSpeedStrategy", "use DDP"), ("FSDPStrategy", "ModelParallelStrateg")]
)
def test_strategies_that_hide_the_gradients(name, advice):
    strategy = type("Custom", (type(name, (SingleDeviceStrategy,), {}),), {})(device=torch.device("cpu"))
    assert advice in refusal(Classifier(), make_trainer(strategy=strategy))


def test_dataloader_iter():
    module = Classifier()
    module.training_step = lambda dataloader_iter: None
    assert "training_step(batch, batch_idx)" in refusal(module)


def test_no_logits_found_shows_what_to_add():
    message = refusal(Bare())
    assert "found no logits in Bare" in message
    added = message.split("to it:\n\n")[1].split("\n\n")[0]
    assert len(added.splitlines()) == 5
    namespace = {}
    exec("class Fixed(Bare):\n" + added, {"Bare": Bare}, namespace)
    module = namespace["Fixed"]()
    module.forward = module.net.forward
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, row_loader())
    assert trainer.optimizers[0].stats()["hessian_updates"] == 1


def test_model_by_name_and_by_module():
    for model in ("net", Toy()):
        module = Bare()
        module.net = module.net if model == "net" else model
        trainer = make_trainer(max_steps=2, sophia=SophiaCallback(model=model, readout=Readout()))
        trainer.fit(module, row_loader())
        assert trainer.optimizers[0].estimator.model is module.net
        assert trainer.optimizers[0].stats()["hessian_updates"] == 1


def test_model_by_a_wrong_name():
    message = refusal(Bare(), make_trainer(sophia=SophiaCallback(model="nett")))
    assert "no such submodule; it has net" in message


def test_the_module_itself_is_no_model():
    module = Bare()
    assert "needs a submodule of Bare" in refusal(module, make_trainer(sophia=SophiaCallback(model=module)))


def test_two_transformers_models():
    module = LanguageModel()
    module.teacher = tiny_model()
    assert "holds 2 transformers models (GPT2LMHeadModel, GPT2LMHeadModel)" in refusal(module, loader=token_loader())


def test_an_estimator_of_the_user_is_kept():
    module = Bare()
    estimator = GaussNewtonBartlett(module.net)
    module.options["estimator"] = estimator
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, row_loader())
    assert trainer.optimizers[0].estimator is estimator
    assert trainer.optimizers[0].stats()["hessian_updates"] == 1


@pytest.mark.parametrize("given", ["logits alone", "no logits"])
def test_sophia_logits_must_return_a_pair(given):
    module = Classifier()
    module.training_step = lambda batch, batch_idx: F.cross_entropy(module.net(batch[0]), batch[1])
    module.sophia_logits = lambda batch: module.net(batch[0]) if given == "logits alone" else ("text", batch[1])
    expected = "must return (logits, targets)" if given == "logits alone" else "no logits"
    assert expected in refusal(module)


def test_a_head_for_more_labels_than_classes_is_an_error_of_shapes():
    module = Classifier()
    module.training_step = lambda batch, batch_idx: F.cross_entropy(module.net(batch[0]), batch[1])
    module.sophia_logits = lambda batch: (module.net(batch[0]), torch.zeros(3, VOCABULARY + 1))
    assert "do not match logits" in refusal(module)


def test_nothing_is_refused_outside_fit():
    module = Classifier()
    module.validation_step = lambda batch, batch_idx: None
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters())
    make_trainer().validate(module, row_loader(), verbose=False)


def test_module_without_parameters_of_the_optimizer():
    module = Bare()
    module.other = nn.Linear(6, VOCABULARY)
    assert "trains no parameter of the Linear" in refusal(
        _only_net(module), make_trainer(sophia=SophiaCallback(model="other"))
    )


def _only_net(module):
    module.configure_optimizers = lambda: SophiaG(module.net.parameters())
    return module

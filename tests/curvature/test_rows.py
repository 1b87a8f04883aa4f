"""How rows of a micro-batch are chosen: the dimension that numbers them, what has none, and whole micro-batches."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracles import draws_of, relative_error, softmax_ggn_diagonal, squared_draw_error
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from sophia_integrations import GaussNewtonBartlett, SophiaG
from sophia_integrations.curvature import Readout
from sophia_integrations.curvature.rows import count_rows, take_rows
from sophia_integrations.curvature.tap import MicroBatch

TIME, BATCH, CLASSES = 6, 4, 3


class Recurrent(nn.Module):
    """Logits [time, batch, classes] of inputs [time, batch, 5], or with dimensions 0 and 1 exchanged."""

    def __init__(self, batch_first=False, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.LSTM(5, 4, batch_first=batch_first)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.drop(self.cell(x)[0]))


def train_forward(model, *args, classes_at=-1):
    logits = model(*args).movedim(classes_at, -1).flatten(0, -2)
    F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1]).backward()


def unit_shapes(estimator, model, forward):
    """Shapes of the first argument in the pass's own training-mode forwards."""
    seen = []
    optimizer = SophiaG(model.parameters(), lr=0.0, weight_decay=0.0, estimator=estimator)
    forward()
    handle = model.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape) if m.training else None)
    optimizer.step()
    handle.remove()
    assert optimizer.stats()["hessian_updates"] == 1
    return [tuple(shape) for shape in seen]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_time_steps_are_never_taken_for_rows_without_a_word(dropout):
    model, x = Recurrent(dropout=dropout), torch.randn(TIME, BATCH, 5)
    estimator = GaussNewtonBartlett(model)
    with pytest.warns(UserWarning, match="whole micro-batches for Recurrent.*dimension 0.*batch_first=False.*"):
        shapes = unit_shapes(estimator, model, lambda: train_forward(model, x))
    assert shapes == [(TIME, BATCH, 5)]


@pytest.mark.parametrize("kind", ["bf16", "only trains"])
def test_batch_first_decides_where_the_trial_cannot_tell(kind):
    class OnlyTrains(Recurrent):
        def forward(self, x):
            if not self.training:
                raise RuntimeError("no evaluation")
            return super().forward(x)

    for batch_first in (False, True):
        model = (OnlyTrains if kind == "only trains" else Recurrent)(batch_first)
        x = torch.randn(TIME, BATCH, 5)
        if kind == "bf16":  # little depends on the time: about as much as rounding may take away
            model, x = model.bfloat16(), x.bfloat16()
            with torch.no_grad():
                model.head.bias.fill_(8.0)
        estimator = GaussNewtonBartlett(model, fraction=1.0)
        with nullcontext() if batch_first else pytest.warns(UserWarning, match="whole micro-batches"):
            shapes = unit_shapes(estimator, model, lambda m=model, x=x: train_forward(m, x))
        assert shapes == ([(1, BATCH, 5)] * TIME if batch_first else [(TIME, BATCH, 5)])


def test_whole_micro_batches_and_batch_dim_1_both_give_the_exact_diagonal():
    model, x = Recurrent().double(), torch.randn(TIME, BATCH, 5, dtype=torch.float64)
    params = list(model.parameters())
    wanted = softmax_ggn_diagonal(lambda: model(x), params)
    options = dict(fraction=1.0, units=BATCH)
    one = GaussNewtonBartlett(model, **options, readout=Readout(batch_dim=1))
    whole = GaussNewtonBartlett(model, **options, readout=Readout(batch_dim=None))
    for estimator in (one, whole):
        draws = draws_of(estimator, lambda: train_forward(model, x), params, 150)
        assert relative_error(draws.mean(0), wanted) < 3 * squared_draw_error(150)
    shapes = unit_shapes(
        GaussNewtonBartlett(model, **options, readout=Readout(batch_dim=1)), model, lambda: train_forward(model, x)
    )
    assert shapes == [(TIME, 1, 5)] * BATCH


@pytest.mark.parametrize("first", [True, False])
def test_independent_rows_are_split_without_a_word(first):
    model = Recurrent(batch_first=True) if first else nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.Linear(8, 3))
    shapes = unit_shapes(
        GaussNewtonBartlett(model, fraction=1.0), model, lambda: train_forward(model, torch.randn(8, 2, 5))
    )
    assert shapes == [(1, 2, 5)] * 8


class WithPrior(nn.Linear):
    """The logits of a row and a prior [classes], which is as long as a batch of three."""

    def forward(self, x, prior):
        return super().forward(x) + prior


def test_a_side_tensor_as_long_as_the_batch_is_not_sliced():
    model, prior = WithPrior(5, 3), torch.tensor([1.0, 2.0, 3.0])
    estimator = GaussNewtonBartlett(model, fraction=1.0)
    with pytest.warns(UserWarning, match="an argument has no rows"):
        shapes = unit_shapes(estimator, model, lambda: train_forward(model, torch.randn(3, 5), prior))
    assert shapes == [(3, 5)]
    said = Readout(rows=lambda batch, index: replace(batch, args=(batch.args[0][index], batch.args[1])))
    estimator = GaussNewtonBartlett(model, fraction=1.0, readout=said)
    assert unit_shapes(estimator, model, lambda: train_forward(model, torch.randn(3, 5), prior)) == [(1, 5)] * 3
    estimator = GaussNewtonBartlett(model, fraction=1.0)  # of another length it passes through
    assert unit_shapes(estimator, model, lambda: train_forward(model, torch.randn(4, 5), prior)) == [(1, 5)] * 4


def test_tensors_without_the_batch_dimension_pass_through():
    scale, side, x, y = torch.tensor(2.0), torch.arange(5), torch.randn(4, 3), torch.arange(4)
    batch = MicroBatch((x, scale), {"side": side, "flag": True, "y": y}, None, None)
    part = take_rows(batch, torch.tensor([3, 1]), 0, 4)
    assert torch.equal(part.args[0], x[[3, 1]]) and part.args[1] is scale and part.kwargs["side"] is side
    assert part.kwargs["flag"] is True and torch.equal(part.kwargs["y"], torch.tensor([3, 1]))


@dataclass
class Graph:
    x: torch.Tensor


class Named(NamedTuple):
    x: torch.Tensor


def packed(lengths=(4, 3, 2)):
    return pack_padded_sequence(torch.randn(3, 4, 5), lengths, batch_first=True)


CONTAINERS = {
    "dataclass": (lambda: Graph(torch.randn(6, 5)), lambda batch: batch.x, None),
    "list of records": (
        lambda: [{"x": torch.randn(5)} for _ in range(6)],
        lambda batch: torch.stack([record["x"] for record in batch]),
        None,
    ),
    "packed sequence": (packed, lambda batch: batch.data, None),
    "nested tensor": (
        lambda: torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=torch.jagged),
        lambda batch: batch.values(),
        None,
    ),
    "named tuple": (lambda: Named(torch.randn(6, 5)), lambda batch: batch.x, 6),
    "dictionary": (lambda: {"x": torch.randn(6, 5)}, lambda batch: batch["x"], 6),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_containers_with_and_without_a_dimension_of_rows(name):
    make, tensor_of, size = CONTAINERS[name]

    class Model(nn.Linear):
        units = 0

        def forward(self, batch):
            self.units += self.training
            return super().forward(tensor_of(batch))

    model, batch = Model(5, 3), make()
    assert count_rows(MicroBatch((batch,), {}, None, None), 0) == size
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model, fraction=1.0))
    train_forward(model, batch)
    model.units = 0
    optimizer.step()
    assert optimizer.stats()["hessian_updates"] == 1 and model.units == (size or 1)


def test_rows_of_the_user_choose_sequences_of_a_packed_batch():
    class Packed(Recurrent):
        def forward(self, batch):
            hidden, _ = pad_packed_sequence(self.cell(batch)[0], batch_first=True, total_length=4)
            return self.head(hidden)

    def rows(batch, index):
        padded, lengths = pad_packed_sequence(batch.args[0], batch_first=True)
        return replace(batch, args=(pack_padded_sequence(padded[index], lengths[index], batch_first=True),))

    sizes = []
    model = Packed()
    optimizer = SophiaG(
        model.parameters(), estimator=GaussNewtonBartlett(model, fraction=1.0, readout=Readout(rows=rows))
    )
    train_forward(model, packed())
    model.register_forward_pre_hook(lambda m, a: sizes.append(int(a[0].batch_sizes[0])))
    optimizer.step()
    assert sizes == [1, 1, 1] and isinstance(packed(), PackedSequence)


def test_another_number_of_predictions_than_in_the_training_forward_is_refused():
    class Pooled(nn.Linear):
        """Rows of a batch may be regrouped, which only shows in how many predictions come out."""

        rows_are_known = True

        def forward(self, x):
            return super().forward(x)[: max(len(x), 3)].repeat(2 if len(x) > 3 else 3, 1)

    readout = Readout()
    readout.rows_are_known = True
    model = Pooled(5, 3)
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model, fraction=1.0, readout=readout))
    train_forward(model, torch.randn(8, 5))
    with pytest.raises(ValueError, match=r"shape \[3, 3\] for 1 of 8 rows.*made \[16, 3\].*batch_dim=…"):
        optimizer.step()


def test_the_trial_leaves_modes_random_numbers_and_buffers_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.drop = nn.Linear(5, 3), nn.Dropout()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1 + torch.rand(())
            return self.net(self.drop(x))

    model = Counting()
    model.drop.eval()
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model))
    train_forward(model, torch.randn(8, 5))
    before = model.calls.clone(), torch.get_rng_state(), [m.training for m in model.modules()]
    optimizer.step()
    assert torch.equal(model.calls, before[0]) and torch.equal(torch.get_rng_state(), before[1])
    assert [m.training for m in model.modules()] == before[2]


def test_the_trial_changes_no_estimate():
    """A resumed run tries anew: what it draws must not depend on it."""
    x = torch.randn(8, 5)

    def second_estimate(model, tried):
        estimator = GaussNewtonBartlett(model)
        estimator._rows_tried = tried
        return draws_of(estimator, lambda: train_forward(model, x), list(model.parameters()), 1)[0]

    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.Linear(8, 3))
    assert torch.equal(second_estimate(model, {}), second_estimate(copy.deepcopy(model), {(True,): True}))


def test_batch_normalization_in_evaluation_mode_lets_rows_be_split():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[1].eval()
    shapes = unit_shapes(
        GaussNewtonBartlett(model, fraction=1.0), model, lambda: train_forward(model, torch.randn(8, 5))
    )
    assert shapes == [(1, 5)] * 8

"""Nothing that the optimizer does at a step reads a value on the host, unless a line here says so."""

import warnings

import pytest
import torch
from specification import ScriptedEstimator
from support import DEVICE, FixedLabels, tiny_model, token_rows
from torch.utils._python_dispatch import TorchDispatchMode

from sophia_integrations import GaussNewtonBartlett, SophiaG
from sophia_integrations.curvature.transfer import numbers, on_host
from sophia_integrations.optim import later, trust
from sophia_integrations.optim.basis import Basis, average, carry_hessian, into, layout_of
from sophia_integrations.optim.eigenvectors import _cholesky_qr, refresh
from sophia_integrations.optim.gradients import all_finite
from sophia_integrations.optim.nonfinite import NonFiniteGradients

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Reads(TorchDispatchMode):
    """Counts what would wait for a device: numbers read on the host, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        return func(*args, **(kwargs or {}))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_small_tensors_travel_together_and_arrive_as_they_were():
    tensors = [
        torch.tensor(3.5, device=DEVICE),
        torch.tensor([True, False, True], device=DEVICE),
        torch.arange(6, device=DEVICE).view(2, 3).t(),
        torch.tensor([[1e-300]], dtype=torch.float64, device=DEVICE),
        torch.zeros(0, device=DEVICE),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16, device=DEVICE),
    ]
    for sent, arrived in zip(tensors, on_host(tensors), strict=True):
        assert arrived.device.type == "cpu" and arrived.dtype == sent.dtype and torch.equal(arrived, sent.cpu())
    assert on_host([]) == []
    assert numbers([torch.tensor(2, device=DEVICE), 7, torch.tensor(True, device=DEVICE)]) == [2, 7, True]


def test_all_finite():
    good, empty = normal(5), normal(0)
    assert all_finite([empty]) is True and bool(all_finite([good, empty, good.double()]))
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite([good, torch.tensor([1.0, value], device=DEVICE)])


def test_ratios_are_counted_without_asking_for_the_largest():
    bins = torch.randint(trust.BINS + 1, (5000,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with Reads() as reads:
        counts = trust._bin_counts_on_device(bins)
    assert reads.count == 0 and torch.equal(counts, trust._bin_counts(bins))


def test_the_eigenvectors_are_refreshed_without_a_word_to_the_host(monkeypatch):
    monkeypatch.setattr(torch.linalg, "qr", lambda images: (_cholesky_qr(images, images), None))  # as on a GPU
    bases = [Basis(layout_of(torch.Size((6, 8)), None), {"hessian": normal(6, 8).abs()}) for _ in range(3)]
    gradients = [normal(6, 8, seed=i) for i in range(3)]
    average(bases, gradients, 0.8)
    refresh([side for basis in bases for side in basis.sides()])
    average(bases, gradients, 0.8)
    with Reads() as reads:
        carry_hessian(bases, refresh([side for basis in bases for side in basis.sides()]))
        into(bases, gradients)
    assert reads.count == 0


def waits_of_a_pass(monkeypatch, accumulation, units):
    """Transfers to the host, and numbers read there, in one estimate."""
    transfers = []

    def transfer(tensors):
        transfers.append(len(tensors))
        return on_host(tensors)

    monkeypatch.setattr("sophia_integrations.curvature.witness.on_host", transfer)
    monkeypatch.setattr("sophia_integrations.curvature.transfer.on_host", transfer)
    monkeypatch.setattr("sophia_integrations.curvature.gnb.known_to_be_zero", lambda count: False)  # as on a GPU
    model = tiny_model().to(DEVICE).train()
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=units)
    estimator.readout.likelihood = FixedLabels()
    optimizer = SophiaG(model.parameters(), lr=1e-3, estimator=estimator)
    rows = token_rows(8 * accumulation, masked=False)
    for i in range(accumulation):
        batch = {k: torch.stack([row[k] for row in rows[8 * i : 8 * i + 8]]).to(DEVICE) for k in rows[0]}
        (model(**batch).loss / accumulation).backward()
    with Reads() as reads:
        estimate = estimator.estimate(optimizer.param_groups[0]["params"], 0)
    assert estimate.dropped is None and estimate.num_predictions == 8 * accumulation * 11
    assert estimate.batch_predictions == estimate.num_predictions
    return len(transfers), reads.count


def test_a_pass_waits_once_before_it_begins_and_once_at_its_end(monkeypatch):
    """However many units and micro-batches there are; what else is read there lies on the host already."""
    few, many = (waits_of_a_pass(monkeypatch, 1, units) for units in (1, 8))
    assert few == many and few[0] == 2
    assert waits_of_a_pass(monkeypatch, 4, 8)[0] == 2


class Event:
    """As torch.cuda.Event: it has happened once the test says so."""

    happened = False
    clock = 0.0

    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = Event.clock

    def query(self):
        return Event.happened

    def synchronize(self):
        Event.happened = True

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


@pytest.fixture
def device_of_events(monkeypatch):
    """A stand-in for a GPU: its clock, and whether it has got as far as the host."""
    monkeypatch.setattr(Event, "happened", False)
    monkeypatch.setattr(Event, "clock", 0.0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    return Event


def test_a_stopwatch_reads_the_device_s_clock_later(device_of_events):
    watch = later.Stopwatch()
    for begin, end in ((1.0, 3.0), (5.0, 5.5)):
        Event.clock = begin
        watch.start(torch.device("cuda"))
        Event.clock = end
        watch.stop()
    assert not Event.happened and watch._seconds == 0, "nothing was waited for"
    assert watch.seconds == 2.5 and Event.happened


def test_a_stopwatch_on_the_cpu():
    watch = later.Stopwatch()
    watch.start(torch.device("cpu"))
    watch.stop()
    assert 0 < watch.seconds < 10


def test_a_device_is_asked_for_its_count_and_heard_later(device_of_events, monkeypatch):
    class FromDevice(later.Later):
        def __init__(self, value):
            assert value.device.type == "meta"
            self._value, self._event = torch.tensor(3), Event()

    monkeypatch.setattr("sophia_integrations.optim.nonfinite.Later", FromDevice)
    nonfinite = NonFiniteGradients()
    nonfinite.add(torch.zeros((), dtype=torch.int64, device="meta"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nonfinite.warn(1, wait=True)
        nonfinite.warn(2, wait=False)
    assert not Event.happened
    Event.happened = True
    with pytest.warns(UserWarning, match="3 gradient coordinates were not finite by step 3"):
        nonfinite.warn(3, wait=False)
    nonfinite.warn(4, wait=True)


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU can be waited for")
def test_a_step_between_two_passes_does_not_wait():
    params = [torch.nn.Parameter(normal(64, 48, seed=i)) for i in range(3)]
    estimator = ScriptedEstimator(lambda step, params: [torch.ones_like(p) for p in params])
    optimizer = SophiaG(params, lr=torch.tensor(1e-3, device=DEVICE), basis="eigen", estimator=estimator)
    for step in range(8):
        for i, p in enumerate(params):
            p.grad = normal(64, 48, seed=100 * step + i)
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

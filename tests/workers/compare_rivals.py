"""Train a tiny model by each rival that is named, in a process that knows them as a comparison's runs do."""

import json
import sys

from sophia_integrations.reports.compare.child import know_rivals

know_rivals()

from support import make_trainer  # noqa: E402

from sophia_integrations.reports.compare.rivals import RIVALS  # noqa: E402

RATES = {"muon": 1e-2, "soap": 1e-2, "lion": 2e-3, "adahessian": 3e-4}


def main(folder, names):
    losses = {}
    for name in names:
        options = dict(optim=RIVALS[name].optim, optim_args="beta1=0.8", learning_rate=RATES[name])
        trainer = make_trainer(folder, **options, max_steps=30, gradient_accumulation_steps=2)
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("losses", json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

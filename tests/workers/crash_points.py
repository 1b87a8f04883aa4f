"""Dies by SIGKILL at the n-th change of the run folder, for many n, and tells what each death left.

Writes found.json, a list: for each n the steps whose saving had ended, the newest whole checkpoint, what was said of
others, what was left.
"""

import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

from support import make_trainer, tiny_model, token_rows
from transformers import TrainerCallback

from sophia_integrations.recipes.running.checkpoints import SAVING, newest_whole
from sophia_integrations.recipes.running.processes import Processes
from sophia_integrations.recipes.running.run_folder import RunFolder
from sophia_integrations.recipes.running.run_log import RunLog
from sophia_integrations.recipes.running.signals import StopRequest
from sophia_integrations.recipes.running.trainer_callback import RecipeTrainer, RunFolderCallback

STEPS = 3
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
place, start, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


class Note(TrainerCallback):
    def __init__(self, file):
        self.file = file

    def on_save(self, args, state, control, **kwargs):
        self.file.write(f"{state.global_step}\n")
        self.file.flush()


def die_at(count, folder):
    """Ends this process just before the `count`-th change of `folder`; Python tells of each."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        change = event in CHANGES or (event == "open" and "w" in str(arguments[1]))
        in_rmtree = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # named by its open folder
        if change and (in_rmtree or str(folder) in str(arguments[0])):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def train(folder, count):
    die_at(count, folder)
    with open(f"{folder}.saved", "a") as file:
        settings = make_trainer(folder / SAVING, model=MODEL, data=DATA, max_steps=STEPS, save_strategy="steps",
                                save_steps=1, logging_strategy="no").args  # fmt: skip
        run_folder = RunFolder(folder)
        saving = RunFolderCallback(run_folder, RunLog(run_folder.metrics), StopRequest(Processes()), keep=1)
        saving.trainer = RecipeTrainer(model=MODEL, args=settings, train_dataset=DATA, callbacks=[saving, Note(file)])
        saving.trainer.train()


warnings.simplefilter("ignore")
MODEL, DATA = tiny_model(), token_rows()
found, count = [], start
while True:
    folder = place / f"death-{count}"
    folder.mkdir()
    child = os.fork()
    if child == 0:
        train(folder, count)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    saved = [int(line) for line in Path(f"{folder}.saved").read_text().split()]
    said = []
    shutil.rmtree(folder / SAVING, ignore_errors=True)
    newest = newest_whole(folder, said.append)
    left = sorted(path.name for path in folder.iterdir() if "metrics" not in path.name)
    found.append({"saved": saved, "newest": newest.step if newest else 0, "said": said, "left": left})
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    count += stride
(place / "found.json").write_text(json.dumps(found))

"""A recipe trained by every process, which then tells what still holds the process group."""

import gc
import sys

from torch.nn.parallel import DistributedDataParallel

from sophia_integrations.recipes.running.train import train

train(sys.argv[1], sys.argv[2:], say=lambda line: None)
held = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
sys.stdout.write(f"\nheld by {held}\n")

"""``sophia train --nproc N``: the same command in N processes of this machine, by torchrun."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from ..errors import UserError


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Runs ``sophia ARGUMENTS`` in `nproc` processes and returns the exit code of the first one that failed, or 0.

    Raises:
        UserError: this process is already one of several.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("--nproc starts the processes itself: leave it out under torchrun or accelerate launch")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.CRITICAL)  # torchrun's reports: the processes say themselves what is wrong
    package = __package__.partition(".")[0]
    try:
        torchrun(["--standalone", f"--nproc-per-node={nproc}", "-m", package, *arguments])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code >= 0:
            return code
        print(f"a process of this run was ended by signal {-code}; the others were stopped", file=sys.stderr)
        return 128 - code
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0

"""Looking at a model in the middle of its training without leaving a trace.

Everything a callback of this package runs on the user's model runs inside :func:`probe_scope`. A
contract test trains with every callback on and off and compares weights and optimizer state bit for
bit.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from mda_lightning.influence.training_taps import unheard
from mda_lightning.modes import evaluating


@contextmanager
def probe_scope(model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` may be run; on leaving, all is as it was.

    - Random numbers: the states of torch (CPU and, once in use, CUDA), numpy and ``random`` are put
      back.
    - Modes: every module is in eval mode and returns to its own former mode.
    - Precision: autocast is off, so that scores do not depend on the trainer's precision plugin.
    - Compilation: a model compiled in place runs eagerly, since hooks added later are ignored by
      compiled code; its compiled code and guards stay.
    - In-run scoring: it does not hear what is run here.
    - Gradients: enabled or not as the code inside says. That code uses ``torch.autograd.grad`` and
      never ``.backward``, so no ``.grad`` is touched.

    The attention implementation is switched, and switched back, where patterns are read
    (:mod:`mda_lightning.attention`).
    """
    with ExitStack() as stack:
        stack.enter_context(_random_states_kept())
        stack.enter_context(evaluating(model))
        stack.enter_context(unheard())
        for device in {"cpu", *(p.device.type for p in model.parameters())}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        # Importing dynamo takes seconds; where it is not imported nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def _random_states_kept() -> Iterator[None]:
    cpu = torch.get_rng_state()
    # Asking for CUDA's states would initialise CUDA in a run that does not use it.
    cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else None
    of_numpy = np.random.get_state()  # noqa: NPY002 - the user's global state, only kept for them
    of_python = random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)

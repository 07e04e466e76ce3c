"""Processes for the tests that kill: forked from one that has torch loaded, so that each is cheap.

Not forked from pytest's own process: torch cannot go on after its autograd threads were forked.
"""

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["opacus_pil.unlearning.engine", "opacus_pil.unlearning.requests"])

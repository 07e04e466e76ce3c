"""Processes for the tests that kill: forked from one that has everything loaded, hence cheap.

Not forked from pytest's own process: torch cannot go on after its autograd threads were forked.
"""

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
# torch loads torch._dynamo with the first optimizer, which takes longer than all the rest.
CONTEXT.set_forkserver_preload(["pytest", "torch._dynamo", "tests.unlearning.kill_target"])

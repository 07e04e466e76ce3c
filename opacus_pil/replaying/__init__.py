"""A training that somebody else ran: from its checkpoints to an account of every instance."""

from .described_run import DescribedRun as DescribedRun
from .described_run import described_run as described_run
from .replay import replay as replay
from .saved_weights import SavedWeights as SavedWeights
from .saved_weights import fit_weights as fit_weights
from .saved_weights import read_weights as read_weights

"""The claims of Sepahvand et al. (2025), arXiv:2505.18786, put to the test on real images."""

from .run import StudyOutcome as StudyOutcome
from .run import run_study as run_study

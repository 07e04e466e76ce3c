"""Forgetting instances by noisy fine-tuning on the rest: a plan first, then the run."""

from .engine import UnlearningEngine as UnlearningEngine
from .plan import CertifiedPlan as CertifiedPlan
from .plan import PredictedPlan as PredictedPlan
from .plan import RetrainPlan as RetrainPlan
from .plan import UnlearningPlan as UnlearningPlan
from .requests.queue import Request as Request
from .requests.queue import RequestQueue as RequestQueue
from .result import CertifiedResult as CertifiedResult
from .result import RetrainedResult as RetrainedResult
from .result import UncertifiedResult as UncertifiedResult
from .result import UnlearningResult as UnlearningResult

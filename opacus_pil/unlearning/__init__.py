"""Forgetting instances by noisy fine-tuning on the rest: a plan first, then the run."""

from .engine import UnlearningEngine as UnlearningEngine
from .options import Option as Option
from .options import Options as Options
from .plan import CertifiedPlan as CertifiedPlan
from .plan import PredictedPlan as PredictedPlan
from .plan import RetrainPlan as RetrainPlan
from .plan import UnlearningPlan as UnlearningPlan
from .requests.queue import Request as Request
from .requests.queue import RequestQueue as RequestQueue
from .requests.served import Served as Served
from .requirements import Requirement as Requirement
from .requirements import Requirements as Requirements
from .result import CertifiedResult as CertifiedResult
from .result import RetrainedResult as RetrainedResult
from .result import UncertifiedResult as UncertifiedResult
from .result import UnlearningResult as UnlearningResult
from .suggest import Suggestion as Suggestion

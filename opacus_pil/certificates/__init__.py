"""What unlearning achieves, under which assumptions: numpy and scipy only."""

from .best import BestCertificate as BestCertificate
from .best import best_of as best_of
from .contraction import ContractionCertificate as ContractionCertificate
from .data_processing import DataProcessingCertificate as DataProcessingCertificate
from .langevin import LangevinCertificate as LangevinCertificate
from .log_sobolev import lsi_constant_after as lsi_constant_after
from .noisy_finetuning import NoisyFineTuningCertificate as NoisyFineTuningCertificate
from .record import Certificate as Certificate

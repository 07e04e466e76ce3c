"""What unlearning achieves, under which assumptions: numpy and scipy only."""

from .best import BestCertificate as BestCertificate
from .best import best_of as best_of
from .certificate_file import read_certificate as read_certificate
from .certificate_file import read_key as read_key
from .certificate_file import write_certificate as write_certificate
from .certificate_record import CertificateRecord as CertificateRecord
from .certificate_record import certificate_record as certificate_record
from .contraction import ContractionCertificate as ContractionCertificate
from .data_processing import DataProcessingCertificate as DataProcessingCertificate
from .known_batches import known_batches as known_batches
from .langevin import LangevinCertificate as LangevinCertificate
from .log_sobolev import lsi_constant_after as lsi_constant_after
from .mini_batches import PoissonContractionCertificate as PoissonContractionCertificate
from .noisy_finetuning import NoisyFineTuningCertificate as NoisyFineTuningCertificate
from .record import Certificate as Certificate
from .sequential import sequential_requests as sequential_requests
from .verification import VerificationReport as VerificationReport
from .verification import verify_certificate as verify_certificate

"""What unlearning achieves, under which assumptions: numpy and scipy only."""

from .assumptions import Assumption as Assumption
from .assumptions import assumption as assumption
from .best import BestCertificate as BestCertificate
from .best import best_of as best_of
from .certificate import Certificate as Certificate
from .certificate import OnProbe as OnProbe
from .certificate_file import read_certificate as read_certificate
from .certificate_file import read_key as read_key
from .certificate_file import write_certificate as write_certificate
from .certificate_record import CertificateRecord as CertificateRecord
from .contraction import ContractionCertificate as ContractionCertificate
from .data_processing import DataProcessingCertificate as DataProcessingCertificate
from .known_batches import known_batches as known_batches
from .langevin import LangevinCertificate as LangevinCertificate
from .log_sobolev import lsi_constant_after as lsi_constant_after
from .methods import CERTIFIED_METHODS as CERTIFIED_METHODS
from .mini_batches import PoissonContractionCertificate as PoissonContractionCertificate
from .noisy_finetuning import NoisyFineTuningCertificate as NoisyFineTuningCertificate
from .recording import certificate_record as certificate_record
from .sequential import sequential_requests as sequential_requests
from .signature import new_key as new_key
from .signature import read_public_key as read_public_key
from .signature import sign_certificate as sign_certificate
from .verification import verify_certificate as verify_certificate
from .verification_report import VerificationReport as VerificationReport

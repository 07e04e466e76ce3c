"""What each instance's participation gives away: numpy and scipy only, torch is never imported."""

from .accountant import PerInstanceAccountant as PerInstanceAccountant
from .compact_orders import COMPACT_ORDERS as COMPACT_ORDERS
from .composition import CompositionResult as CompositionResult
from .composition import compose_per_instance as compose_per_instance
from .composition import order_schedule as order_schedule
from .contracted_loss import ContractedLoss as ContractedLoss
from .groups import group_rdp as group_rdp
from .guarantee import GUARANTEES as GUARANTEES
from .guarantee import PerInstanceEpsilon as PerInstanceEpsilon
from .kl import sampled_gaussian_kl as sampled_gaussian_kl
from .rdp import DEFAULT_ORDERS as DEFAULT_ORDERS
from .rdp import rdp_to_epsilon as rdp_to_epsilon
from .rdp import sampled_gaussian_rdp as sampled_gaussian_rdp
from .targets import noise_multiplier_for as noise_multiplier_for
from .targets import rdp_to_delta as rdp_to_delta

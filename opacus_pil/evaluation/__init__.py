"""Evidence against retraining: oracles, gaps, loss barriers; which scores foresee difficulty."""

from .attack import AreaUnderCurve as AreaUnderCurve
from .attack import AttackSummary as AttackSummary
from .attack import Proportion as Proportion
from .attack import TruePositives as TruePositives
from .attack import attack_summary as attack_summary
from .bootstrap import Estimate as Estimate
from .calibrate import calibrate as calibrate
from .class_outputs import EnsembleOutputs as EnsembleOutputs
from .class_outputs import ensemble_outputs as ensemble_outputs
from .deciles import GroupComparison as GroupComparison
from .deciles import compare_groups as compare_groups
from .deciles import group_hardness as group_hardness
from .deciles import top_group_difference as top_group_difference
from .difficulty import DifficultyTracker as DifficultyTracker
from .difficulty import difficulty_scores as difficulty_scores
from .ensemble import Oracle as Oracle
from .ensemble import retrained_ensemble as retrained_ensemble
from .ensemble import run_trials as run_trials
from .estimate_convergence import RankingStability as RankingStability
from .estimate_convergence import estimate_convergence as estimate_convergence
from .estimate_convergence import estimated_privacy_losses as estimated_privacy_losses
from .estimated_losses import EstimatedLosses as EstimatedLosses
from .gap import Gap as Gap
from .gap import Metrics as Metrics
from .gap import SplitGap as SplitGap
from .gap import Spread as Spread
from .gap import evaluate as evaluate
from .gap import evaluate_splits as evaluate_splits
from .gap import oracle_gap as oracle_gap
from .gap import time_to_unlearn as time_to_unlearn
from .held_out import held_out_losses as held_out_losses
from .held_out import mean_held_out as mean_held_out
from .influence import InfluenceScores as InfluenceScores
from .influence import influence_scores as influence_scores
from .leverage import last_layer_features as last_layer_features
from .leverage import last_layer_leverage as last_layer_leverage
from .loss_barrier import LossBarrier as LossBarrier
from .loss_barrier import loss_barrier as loss_barrier
from .loss_traces import loss_trace_iqr as loss_trace_iqr
from .margins import Klom as Klom
from .margins import MarginDeviation as MarginDeviation
from .margins import gaussian_klom as gaussian_klom
from .margins import klom as klom
from .margins import klom_of_oracles as klom_of_oracles
from .margins import margin_deviation as margin_deviation
from .membership import MembershipScores as MembershipScores
from .membership import ULiraScores as ULiraScores
from .membership import membership_scores as membership_scores
from .membership import memorisation_scores as memorisation_scores
from .membership import u_lira_scores as u_lira_scores
from .oracle import retrained_oracles as retrained_oracles
from .rank_correlation import ScoreComparison as ScoreComparison
from .rank_correlation import compare_scores as compare_scores
from .rank_correlation import correlation_difference as correlation_difference
from .rank_correlation import rank_correlation as rank_correlation
from .task_metrics import evaluate_task as evaluate_task
from .visits import DIFFICULTY_SCORES as DIFFICULTY_SCORES

__all__ = [
    "DIFFICULTY_SCORES",
    "AreaUnderCurve",
    "AttackSummary",
    "DifficultyTracker",
    "EnsembleOutputs",
    "Estimate",
    "EstimatedLosses",
    "Gap",
    "GroupComparison",
    "InfluenceScores",
    "Klom",
    "LossBarrier",
    "MarginDeviation",
    "MembershipScores",
    "Metrics",
    "Oracle",
    "Proportion",
    "RankingStability",
    "ScoreComparison",
    "SplitGap",
    "Spread",
    "TruePositives",
    "ULiraScores",
    "attack_summary",
    "calibrate",
    "compare_groups",
    "compare_scores",
    "correlation_difference",
    "difficulty_scores",
    "ensemble_outputs",
    "estimate_convergence",
    "estimated_privacy_losses",
    "evaluate",
    "evaluate_splits",
    "evaluate_task",
    "gaussian_klom",
    "group_hardness",
    "held_out_losses",
    "influence_scores",
    "klom",
    "klom_of_oracles",
    "last_layer_features",
    "last_layer_leverage",
    "loss_barrier",
    "loss_trace_iqr",
    "margin_deviation",
    "mean_held_out",
    "membership_scores",
    "memorisation_scores",
    "oracle_gap",
    "rank_correlation",
    "retrained_ensemble",
    "retrained_oracles",
    "run_trials",
    "time_to_unlearn",
    "top_group_difference",
    "u_lira_scores",
]

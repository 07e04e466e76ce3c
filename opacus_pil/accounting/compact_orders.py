"""Sixteen Rényi orders for millions of instances, and what the others would have gained.

Knows orders only. Fewer orders are always sound: ε is the smallest over the orders that are there.
"""

from __future__ import annotations

# A part of DEFAULT_ORDERS, chosen by exchange to lose little ε over 28,600 cases: noise multiplier
# 0.4 … 8 (13 values), sample rate 1e-5 … 1 (10), 10 … 1e5 steps, sensitivity 0.001 … 1 (11),
# δ 1e-4 … 1e-7 (4). ε with these over ε with all, by ε with all (where that is positive):
#
#     ε with all    cases   median   90 %   99 %   largest
#     < 0.05       12,702    1.000   1.88   3.40   18.9
#     0.05 … 1      7,419    1.012   1.33   1.41    1.47
#     1 … 10        4,081    1.010   1.17   1.37    1.57
#     10 … 50       1,423    1.005   1.03   1.14    1.23
#
# The large ratios are where sampling is rare and the divergence jumps at an order that is not here:
# ε is then about log(1/δ) / (order − 1) at the next lower one. Below 0.05 that is 0.04 at most.
# An ε above 50 is not cared for. `python benchmarks/scale.py` measures these figures again.
COMPACT_ORDERS: tuple[float, ...] = (
    1.66, 2.25, 3.0, 4.5, 6.4, 9.2, 13.8, 20.5, 32.0, 47.0, 72.0, 108.0, 147.0, 400.0, 1280.0,
    4096.0,
)  # fmt: skip

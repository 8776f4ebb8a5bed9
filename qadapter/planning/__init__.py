"""What a training run will need, told before it: memory by part, time, disk, the engine to take.

Counts are exact where they can be (weights, adapters, features); what activations take and what
arithmetic is asked are formulas, held by tests against what torch saves and counts and against the
committed measurements. Times are estimates: arithmetic over the rates of ``machines``.
"""

from qadapter.planning.costs import Costs, Run, costs_of
from qadapter.planning.engines import Engine, Plan, choose, engines, plan_of, smallest
from qadapter.planning.lengths import Lengths, lengths_of
from qadapter.planning.machines import Machine, machine_of, this_machine
from qadapter.planning.shapes import Shape, Trained, outline_of

__all__ = [
    "Costs", "Engine", "Lengths", "Machine", "Plan", "Run", "Shape", "Trained", "choose",
    "costs_of", "engines", "lengths_of", "machine_of", "outline_of", "plan_of", "smallest",
    "this_machine",
]

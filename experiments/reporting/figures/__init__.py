"""Every picture of the project. Each function takes plain data and returns a matplotlib figure,
ready for `figure.savefig(path)` or to be the last value of a notebook's cell; none touches pyplot,
so no display and no global state are involved.
"""

from experiments.reporting.figures.ablation import ablation as ablation
from experiments.reporting.figures.confusion import confusion as confusion
from experiments.reporting.figures.fusion import gate_strength as gate_strength
from experiments.reporting.figures.fusion import planes as planes
from experiments.reporting.figures.solver import phase_portrait as phase_portrait
from experiments.reporting.figures.solver import radii as radii
from experiments.reporting.figures.solver import residual_traces as residual_traces
from experiments.reporting.figures.solver import residuals as residuals
from experiments.reporting.figures.solver import steps_by_radius as steps_by_radius
from experiments.reporting.figures.sweep import sweep as sweep
from experiments.reporting.figures.training import learning_curve as learning_curve
from experiments.reporting.figures.training import learning_curves as learning_curves
from experiments.reporting.figures.training import solver_health as solver_health

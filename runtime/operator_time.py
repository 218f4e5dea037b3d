"""What one operator of a graph takes, as an engine tells it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """One operator's time in a graph.

    Attributes:
        graph: Its graph.
        kind: What it computes, e.g. "conv".
        unit: Where it runs, e.g. "MLNeuralEngineComputeDevice" or "delegate".
        p50_ms: Median of its runs; with Core ML the graph's time times the share that the compute
            plan estimates.
    """

    graph: str
    kind: str
    unit: str
    p50_ms: float

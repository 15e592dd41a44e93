"""Whether the methods said the same: greedy token ids, request by request.

Sampled tokens are not compared: methods draw from generators of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagelab.results import Difference, Equality, MethodRun, WorkloadRun


def compare_outputs(runs: Sequence[MethodRun]) -> list[Equality]:
    """Compare each method's outputs with the reference's, one entry a method and workload.

    The reference of a workload is the first method that finished it (`hf-generate`, where it
    runs). Of several repeats the first one that finished the workload is taken. Simulated runs
    have no tokens of a model and are left out.
    """
    first: dict[tuple[str, str], WorkloadRun] = {}
    for run in runs:
        if run["simulated"]:
            continue
        for workload in run["workloads"]:
            first.setdefault((workload["name"], run["label"]), workload)
    references: dict[str, str] = {}
    found: list[Equality] = []
    for (name, label), workload in first.items():
        reference = references.setdefault(name, label)
        if reference != label:
            found.append(_compare(name, reference, first[name, reference], label, workload))
    return found


def _compare(
    name: str, reference: str, expected: WorkloadRun, label: str, actual: WorkloadRun
) -> Equality:
    outputs = {r["id"]: r["output_token_ids"] for r in actual["requests"]}
    differences: list[Difference] = []
    for request in expected["requests"]:
        difference = first_difference(
            request["id"], request["output_token_ids"], outputs.get(request["id"], [])
        )
        if difference is not None:
            differences.append(difference)
    total = len(expected["requests"])
    return {
        "workload": name,
        "reference": reference,
        "label": label,
        "equal": total - len(differences),
        "total": total,
        "differences": differences,
    }


def first_difference(
    request: str, reference: Sequence[int], tokens: Sequence[int]
) -> Difference | None:
    """Where two outputs part; a missing token is None. None if they are equal."""
    for position in range(max(len(reference), len(tokens))):
        expected = reference[position] if position < len(reference) else None
        actual = tokens[position] if position < len(tokens) else None
        if expected != actual:
            return {
                "request": request,
                "position": position,
                "reference_token": expected,
                "token": actual,
            }
    return None

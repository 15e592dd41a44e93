"""What the experiment asks of every method: requests with prompts, lengths and arrivals.

A workload is made in steps, since lengths count in tokens of the model in use::

    prompts | mixed | large         named.py ─┐
    sharegpt-like | uniform:…     lengths.py ─┼▶ open_shapes ──▶ RequestShape …  (lazy, any number)
    azure.csv | mooncake.jsonl …   traces.py ─┘       │                └▶ request_of ──▶ simulator
                                                load_workload
                                                      ▼
                                       Workload (texts or lengths)
                                                      │ tokenize(encode)   the model's tokenizer
                                                      │ random_ids(vocab)  no tokenizer
                                                      ▼
                                       Workload (token ids)  ──▶ every method, the same ids

The same name, options and seed give the same workload on every machine.
"""

from pagelab.workloads.catalogue import (
    GENERATORS,
    KINDS,
    WORKLOADS,
    load_workload,
    open_shapes,
    split_specs,
)
from pagelab.workloads.named import BUILDERS as _BUILDERS
from pagelab.workloads.named import SEED_PROMPTS, large, mixed, seed_prompts
from pagelab.workloads.request import Workload, WorkloadRequest
from pagelab.workloads.shapes import (
    HASH_BLOCK,
    RequestShape,
    ShapeCounts,
    ShapeOptions,
    ShapeStream,
)
from pagelab.workloads.token_ids import Decode, Encode, random_ids, request_of, tokenize

__all__ = [
    "GENERATORS",
    "HASH_BLOCK",
    "KINDS",
    "SEED_PROMPTS",
    "WORKLOADS",
    "_BUILDERS",
    "Decode",
    "Encode",
    "RequestShape",
    "ShapeCounts",
    "ShapeOptions",
    "ShapeStream",
    "Workload",
    "WorkloadRequest",
    "large",
    "load_workload",
    "mixed",
    "open_shapes",
    "random_ids",
    "request_of",
    "seed_prompts",
    "split_specs",
    "tokenize",
]

"""What a model's steps cost at best on a card: its published limits as a cost model."""

from __future__ import annotations

from pagelab.errors import ConfigError
from pagelab.memory.layout import DTYPE_BYTES
from pagelab.models.model_shape import ModelShape
from pagelab.sim.cost_model import CostModel, DeviceLimits, ModelWork, roofline
from pagelab.sim.planner_cards import find_card


def card_roofline(card: str, shape: ModelShape, dtype: str) -> CostModel:
    """The limits of a card (a name of `planner_cards.CARDS`) for a model.

    Raises:
        ConfigError: there is no such card, or the model's K/V has several groups.
    """
    found = find_card(card)
    limits = DeviceLimits(found.bandwidth, found.matrix_rate)
    return roofline(f"roofline:{card}", model_work(shape, dtype), limits)


def model_work(shape: ModelShape, dtype: str) -> ModelWork:
    """What a step asks of a device: two operations a weight and token."""
    d, parameters = shape.dimensions, shape.parameters
    weights = parameters.read_by_a_step(1, d.num_kv_heads)
    head = d.vocab_size * (d.embedding_width or d.hidden_size)
    layers = parameters.sharded + parameters.kv - parameters.idle
    return ModelWork(
        weight_bytes=weights * DTYPE_BYTES[dtype],
        layer_flops=2 * layers,
        head_flops=2 * head,
        kv_bytes=bytes_per_token(shape, dtype),
        pair_flops=4 * d.num_layers * d.num_heads * d.head_dim,
    )


def bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """K/V bytes a token.

    Raises:
        ConfigError: the model has sliding windows: its pool has several groups.
    """
    if any(group.window is not None for group in shape.groups):
        raise ConfigError(
            f"{shape.name} has layers with a sliding window, which the engine and its simulator "
            "do not have yet: `pagelab plan` counts them"
        )
    return sum(group.bytes_per_token(dtype) for group in shape.groups)

"""The whole model a second time, as the paper writes it: dense masks, fp64, one process.

Shares no code with the package; takes its weights by name and the oracles' picks as they were made.
Shapes: S sequence, B batch, C channels, H query heads, G KV groups, D head dim, V value head dim.
Equation numbers are those of HySparse (arXiv 2602.03560).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlainSettings:
    kinds: str  # one of F, S, W per layer
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    block_size: int
    window: int
    gate_width: int
    rotary_dim: int
    rotary_base: float
    ids: int
    epsilon: float


def token_losses(
    settings: PlainSettings,
    weights: Mapping[str, Tensor],
    picks: Mapping[int, Tensor],
    tokens: Tensor,
    labels: Tensor,
    seen: dict[int, dict[str, Tensor]] | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Cross-entropy per token [B, S], and each full layer's block scores [B, G, S, N].

    Into `seen` go, by layer, the `probability` [B, H, S, S] of full and the `sparse_gate` and
    `window_gate` [B, S, H, 1 or V] of sparse layers.
    """
    seen = {} if seen is None else seen
    hidden = weights["embedding.word_embeddings.weight"][tokens]
    scores: dict[int, Tensor] = {}
    shared = None
    for layer, kind in enumerate(settings.kinds):
        mine = _below(weights, f"decoder.layers.{layer}.")
        normed = _rms_norm(hidden, mine["input_layernorm.weight"], settings.epsilon)
        attention = _below(mine, "self_attention.")
        parts = _project(settings, attention, normed, gated=kind == "S")
        query, key, value = (parts[name] for name in ("query", "key", "value"))
        if kind == "F":
            probability = _softmax(settings, query, key, _causal(hidden.shape[1]))
            mixed = _mix(settings, probability, value)
            scores[layer] = _block_scores(settings, probability)
            seen[layer] = {"probability": probability}
            shared = key, value, picks.get(layer)
        else:
            shared_sink = attention.get("shared_sink")
            window_sink = attention.get("window_sink", shared_sink)
            visible = _window(hidden.shape[1], settings.window)
            mixed = _attend(settings, query, key, value, visible, window_sink)
            if kind == "S":
                assert shared is not None
                assert shared[2] is not None
                sparse = _attend(
                    settings,
                    query,
                    shared[0],
                    shared[1],
                    _picked(settings, shared[2], hidden.shape[1]),
                    attention.get("sparse_sink", shared_sink),
                )
                seen[layer] = {  # Eq. 8
                    name: torch.sigmoid(parts[name]) for name in ("sparse_gate", "window_gate")
                }
                mixed = seen[layer]["sparse_gate"] * sparse + seen[layer]["window_gate"] * mixed
        hidden = hidden + mixed.flatten(2) @ attention["linear_proj.weight"].T
        normed = _rms_norm(hidden, mine["pre_mlp_layernorm.weight"], settings.epsilon)
        gate, up = (normed @ mine["mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ mine["mlp.linear_fc2.weight"].T
    hidden = _rms_norm(hidden, weights["decoder.final_norm.weight"], settings.epsilon)
    output = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    logits = hidden @ output[: settings.ids].T
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logits.logsumexp(-1) - chosen, scores


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix)
    }


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _project(
    settings: PlainSettings, attention: Mapping[str, Tensor], x: Tensor, gated: bool
) -> dict[str, Tensor]:
    """Eq. 1 and 4. Rows of the weight: group by group; in one, all its heads' queries, then its
    key, its value, all its heads' sparse gates, all its heads' window gates."""
    weight = attention["linear_qkv.linear.weight"]
    bias = attention.get("linear_qkv.linear.bias", torch.zeros_like(weight[:, 0]))
    per_group = settings.heads // settings.groups
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    position = 0

    def take(name: str, count: int) -> None:
        nonlocal position
        taken = slice(position, position + count)
        rows.setdefault(name, []).append((weight[taken], bias[taken]))
        position += count

    for _ in range(settings.groups):
        for _ in range(per_group):
            take("query", settings.head_dim)
        take("key", settings.head_dim)
        take("value", settings.value_dim)
        for name in ("sparse_gate", "window_gate") if gated else ():
            for _ in range(per_group):
                take(name, settings.gate_width)
    assert position == weight.shape[0]
    parts = {
        name: torch.stack(
            [x @ piece.T + shift for piece, shift in pieces], dim=2
        )  # [B, S, heads, width]
        for name, pieces in rows.items()
    }
    for name, norm in (("query", "q_layernorm.weight"), ("key", "k_layernorm.weight")):
        if norm in attention:
            parts[name] = _rms_norm(parts[name], attention[norm], settings.epsilon)
        parts[name] = _rotate(settings, parts[name])
    return parts


def _rotate(settings: PlainSettings, x: Tensor) -> Tensor:
    """Channel i turns with channel i + half by position * base^(-2 i / rotary_dim)."""
    half = settings.rotary_dim // 2
    frequency = settings.rotary_base ** (-2.0 * torch.arange(half).double() / settings.rotary_dim)
    angle = torch.arange(x.shape[1]).double()[:, None] * frequency
    angle = angle.to(x.device)[None, :, None, :]
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat(
        [
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
            x[..., 2 * half :],
        ],
        dim=-1,
    )


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def _window(length: int, window: int) -> Tensor:
    """Eq. 5: the last `window` tokens, the own one included."""
    return _causal(length) & ~torch.ones(length, length, dtype=torch.bool).tril(-window)


def _picked(settings: PlainSettings, picks: Tensor, length: int) -> Tensor:
    """Eq. 6: [B, H, S, S], true where a key's block was picked and the key is not in the future."""
    batch, groups, _, _ = picks.shape
    visible = torch.zeros(batch, groups, length, length, dtype=torch.bool)
    for b in range(batch):
        for g in range(groups):
            for t in range(length):
                for block in picks[b, g, t].tolist():
                    if block >= 0:
                        start = block * settings.block_size
                        visible[b, g, t, start : start + settings.block_size] = True
    visible &= _causal(length)
    return visible.repeat_interleave(settings.heads // groups, dim=1)


def _softmax(
    settings: PlainSettings, query: Tensor, key: Tensor, visible: Tensor, sink: Tensor | None = None
) -> Tensor:
    """Probabilities [B, H, S, S] of the visible keys; a sink takes a share and gives nothing."""
    key = key.repeat_interleave(settings.heads // settings.groups, dim=2)
    logits = torch.einsum("bthd,bjhd->bhtj", query, key) / math.sqrt(settings.head_dim)
    weight = torch.exp(logits - logits.detach().amax()) * visible.to(logits.device)
    total = weight.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - logits.detach().amax())[:, None, None]
    return weight / total


def _mix(settings: PlainSettings, probability: Tensor, value: Tensor) -> Tensor:
    value = value.repeat_interleave(settings.heads // settings.groups, dim=2)
    return torch.einsum("bhtj,bjhv->bthv", probability, value)


def _attend(
    settings: PlainSettings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    sink: Tensor | None,
) -> Tensor:
    return _mix(settings, _softmax(settings, query, key, visible, sink), value)


def _block_scores(settings: PlainSettings, probability: Tensor) -> Tensor:
    """Eq. 3 and the maximum over a group's heads: [B, G, S, N], -1 where a block is invisible."""
    probability = probability.detach()
    batch, heads, length, _ = probability.shape
    per_group = heads // settings.groups
    size = settings.block_size
    columns = []
    for start in range(0, length, size):
        best = probability[..., start : start + size].amax(-1)
        best = best.view(batch, settings.groups, per_group, length).amax(2)
        best[..., :start] = -1.0
        columns.append(best)
    return torch.stack(columns, dim=-1)

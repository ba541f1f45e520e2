"""A model with a layer letter, a gate and a sink that the package does not have, put to all uses.

Runs in a process of its own, in which `test_kinds.py` has added them to two files of a copy.
"""

import pytest
import torch

from hysparse_megatron.architecture.layout import parse_layout
from hysparse_megatron.architecture.parameters import count_parameters
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.huggingface.settings import to_json
from hysparse_megatron.huggingface.weights import model_weights
from hysparse_megatron.inference.forward import advance, logits_of
from hysparse_megatron.inference.kv_cache import KvCache
from hysparse_megatron.plan.overview import make_overview
from hysparse_megatron.plan.picture import draw
from hysparse_megatron.plan.report import as_text
from tests.unit.model.tiny_models import VOCABULARY, randomize, tiny_config, tiny_model
from tests.unit.single_process import model_groups

LAYOUT = "F G S F"
OVERRIDES = [f"model.layout={LAYOUT}", "model.gate=pair", "model.sink=window"]


def main() -> None:
    """Plan, train, generate, export."""
    config = tiny_config(*OVERRIDES, f"model.vocab_size={VOCABULARY}")
    kinds = parse_layout(LAYOUT).kinds
    overview = make_overview(config, 1)
    assert "1 gated window" in as_text(overview)
    assert "gated window" in draw(overview)
    with model_groups() as groups:
        model = tiny_model(config, groups)
        counted = count_parameters(config.model, kinds)
        assert sum(p.numel() for p in model.parameters()) == counted.total
        held = [sum(p.numel() for p in layer.parameters()) for layer in model.decoder.layers]
        assert held == [layer.total for layer in counted.layers]
        randomize(model)
        tokens = torch.randint(0, VOCABULARY, (1, 20))
        positions = torch.arange(20).unsqueeze(0)
        model(tokens, positions, None, labels=tokens.roll(-1, dims=1)).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert 0 < parameter.grad.norm() < float("inf"), name
        sinks = {name for name, _ in model.named_parameters() if name.endswith("_sink")}
        assert sinks == {f"decoder.layers.{n}.self_attention.window_sink" for n in (1, 2)}

        model.eval()
        options = {"full_dtype": torch.float32, "window_dtype": torch.float32, "device": "cpu"}
        cache = KvCache(config.model, kinds, [20], **options)
        with torch.no_grad():
            expected = model(tokens, positions, None)
        for piece in tokens.split(7, dim=1):
            hidden = advance(model, cache, [0], piece.tolist())
        found = logits_of(model, hidden)[-1, 0]
        torch.testing.assert_close(found, expected[0, -1].float(), rtol=1e-4, atol=1e-4)
    exports()


def exports() -> None:
    """Each of the three is refused by itself."""
    for overrides, told in [
        ([f"model.layout={LAYOUT}"], "model.layout: G cannot be exported"),
        (["model.layout=F S", "model.gate=pair"], "model.gate: pair cannot be exported"),
        (["model.layout=F S", "model.sink=window"], "model.sink: window cannot be exported"),
    ]:
        with pytest.raises(ConfigError, match=told):
            to_json(tiny_config(*overrides).model, VOCABULARY, 8, "float32")
    with pytest.raises(ConfigError, match="a gated window layer has ring_gate, for which"):
        model_weights(tiny_config(f"model.layout={LAYOUT}").model, VOCABULARY)


if __name__ == "__main__":
    main()
    print("done")

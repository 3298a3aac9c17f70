"""One record a family: what it says is what the family's own forward pass does, and a new one is one record."""

from __future__ import annotations

import json
import shutil

import independent
import pytest
import torch
import transformers
from architectures import ARCHITECTURES as TINY
from architectures import (
    D_MODEL,
    N_HEADS,
    N_LAYERS,
    PAIRS,
    VOCAB,
    gemma_tokenizer,
    llama_tokenizer,
    qwen2_tokenizer,
    randomise,
)
from torch import nn

import sae_bias as sb
from sae_bias.models.architectures import ARCHITECTURES, LAYER_NORM, Architecture, known, register
from sae_bias.models.forward import Kept, capture_layers, forward

TEXT = PAIRS[0][2]
BASE = {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS, "intermediate_size": 64, "max_position_embeddings": 512, "eos_token_id": 0, "bos_token_id": None}  # fmt: skip
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHAPED = {**BASE, "num_key_value_heads": 2}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
FALCON = {k: v for k, v in BASE.items() if k != "intermediate_size"}
OTHERS = {
    "gemma": ("Gemma", SHAPED | {"head_dim": 8}),
    "mixtral": ("Mixtral", SHAPED | MOE),
    "qwen3_moe": ("Qwen3Moe", SHAPED | MOE | {"head_dim": 8}),
    "gpt_oss": ("GptOss", SHAPED | MOE | {"head_dim": 8, "sliding_window": 6}),
    "phi": ("Phi", BASE | {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2", SHAPED),
    "olmo3": ("Olmo3", SHAPED | {"sliding_window": 6}),
    "smollm3": ("SmolLM3", SHAPED | {"pad_token_id": 0}),
    "starcoder2": ("Starcoder2", SHAPED),
    "stablelm": ("StableLm", SHAPED),
    "falcon_alibi": ("Falcon", FALCON | {"alibi": True, "parallel_attn": False, "bias": True}),
    "falcon_40b": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "qwen3_5_moe": ("Qwen3_5Moe", SHAPED | MOE | LINEAR | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2}),
}  # fmt: skip


def wrapped(name: str):
    stem, options = OTHERS[name]
    config_class = getattr(transformers, f"{stem}TextConfig", None) or getattr(transformers, f"{stem}Config")
    hf = randomise(getattr(transformers, f"{stem}ForCausalLM")(config_class(**options)))
    return sb.load_model(hf, tokenizer=qwen2_tokenizer())


def hooked(module, run):
    """What a module gives back while `run` runs, by a plain hook."""
    seen = []
    handle = module.register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o))
    run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", OTHERS)
def test_residual_logits_and_resumed_pass_are_transformers_own(name):
    model = wrapped(name)
    tokens = torch.tensor([model.encode(TEXT)] * 2)
    layers = next(
        m for n, m in model.hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == N_LAYERS
    )
    with torch.no_grad():
        plain = model.hf(input_ids=tokens).logits
        torch.testing.assert_close(forward(model, tokens).logits(), plain, atol=1e-4, rtol=1e-5)
        for layer, x in capture_layers(model, tokens, range(N_LAYERS)).items():
            own = hooked(layers[layer], lambda: model.hf(input_ids=tokens))
            assert torch.equal(x, own.reshape(x.shape))
            resumed = forward(model, tokens, resume=Kept(layer, x)).logits()
            torch.testing.assert_close(resumed, plain, atol=1e-4, rtol=1e-5)
        norm, x = model.arch.norm, 3 * torch.randn(5, D_MODEL)
        torch.testing.assert_close(
            norm.frozen(model.final_norm, x, x), model.final_norm(x), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_gemma_4_is_edited_at_layers_that_read_other_layers_keys(make_tiny, layer):
    """The upper layers read the keys of lower ones and, in prefill, would see the last position alone; the text is that of a loop
    that recomputes everything."""
    tiny = make_tiny("gemma4")
    model, plain = tiny.model, independent.Plain.load(tiny.folder)
    along = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(layer)) * 3
    edit = sb.Steer(sb.Direction("d", sb.Site(layer), along), 1.0)
    ids = plain.ids(TEXT)
    for _ in range(5):
        ids.append(int(plain.logits(ids, lambda x: along.expand_as(x), layer)[-1].argmax()))
    expected = tuple(ids[-5:])
    for use_cache in (True, False):
        (found,) = sb.generate(model, [TEXT], interventions=[edit], max_new_tokens=5, use_cache=use_cache)
        assert found.tokens == expected[: len(found.tokens)]
        assert len(found.tokens) == 5 or found.ended
    with sb.intervene(model, edit) as receipt:
        model.hf.generate(torch.tensor([model.encode(TEXT)]), max_new_tokens=1, do_sample=False)
    assert receipt.edits[0].positions_seen == len(plain.ids(TEXT)) - 1, "every position of the prompt but BOS"


def test_the_multimodal_gemma_4_is_run_as_text():
    text = TINY["gemma4"].make().config
    vision = transformers.Gemma4VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8)  # fmt: skip
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    full = randomise(transformers.Gemma4ForConditionalGeneration(config), embed=1.0)
    model = sb.load_model(full, tokenizer=gemma_tokenizer())
    assert model.architecture == "Gemma4ForCausalLM"
    tokens = torch.tensor([model.encode(TEXT)])
    with torch.no_grad():
        plain = full(input_ids=tokens).logits
        assert torch.equal(model.hf(input_ids=tokens).logits, plain)
        torch.testing.assert_close(forward(model, tokens).logits(), plain, atol=1e-4, rtol=1e-5)


# ── a record from elsewhere ─────────────────────────────────────────────────────────────────────────────────


class OursConfig(transformers.PretrainedConfig):
    model_type = "ours"

    def __init__(self, hidden_size=D_MODEL, num_hidden_layers=2, vocab_size=VOCAB, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size


class OursPre(transformers.PreTrainedModel):
    config_class = OursConfig
    base_model_prefix = "body"


class OursBlock(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.mix = nn.Linear(d, d)

    def forward(self, x, scale=1.0):
        return x + torch.tanh(self.mix(x.cumsum(1))) * scale, None


class OursBody(OursPre):
    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.tower = nn.Module()
        self.tower.blocks = nn.ModuleList(
            [OursBlock(config.hidden_size) for _ in range(config.num_hidden_layers)]
        )
        self.tower.out_norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        x = self.tokens(input_ids)
        for block in self.tower.blocks:
            x = block(x)[0]
        return (self.tower.out_norm(x),)


class OursForCausalLM(OursPre):
    def __init__(self, config):
        super().__init__(config)
        self.body = OursBody(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.body.tokens

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, **kwargs):
        z = self.head(self.body(input_ids)[0])
        return transformers.modeling_outputs.CausalLMOutput(logits=8 * torch.tanh(z / 8))


@pytest.fixture
def ours():
    record = Architecture(
        "Ours", ("ours",), layers="tower.blocks", final_norm="tower.out_norm", norm=LAYER_NORM, tuple_output=True, softcap="cap"
    )  # fmt: skip
    yield register(record)
    del ARCHITECTURES._entries["ours"]


def test_a_new_architecture_is_one_record(ours, pairs, probe):
    hf = randomise(OursForCausalLM(OursConfig(cap=8.0)))
    model = sb.load_model(hf, tokenizer=llama_tokenizer())
    assert "Ours" in known()
    along = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(0))
    edit = sb.Steer(sb.Direction("d", sb.Site(0), along), 2.0)
    swept = sb.run_sweep(model, pairs, sb.Sweep([edit]), probe=probe).frame.iloc[1]["bias"]
    changed = {}
    ordinary = lambda ids: torch.tensor([i not in model.special_ids for i in ids])[:, None]  # noqa: E731
    for steered in (False, True):
        score = []
        for pair in pairs:
            for text in (pair.human, pair.ai):
                ids = model.encode(text)
                step = 2.0 * steered * along * ordinary(ids)
                hook = lambda m, a, o, step=step: (o[0] + step, None)  # noqa: E731
                handle = hf.body.tower.blocks[0].register_forward_hook(hook)
                with torch.no_grad():
                    z = hf(torch.tensor([ids])).logits[0, -1]
                handle.remove()
                words = [[z[model.encode(f"{text} {w}")[len(ids)]].item() for w in side] for side in (probe.positive, probe.negative)]  # fmt: skip
                score.append(sum(words[0]) / len(words[0]) - sum(words[1]) / len(words[1]))
        changed[steered] = sum(score[::2]) / len(pairs) - sum(score[1::2]) / len(pairs)
    assert sb.run_probe(model, pairs, probe).bias == pytest.approx(changed[False], abs=1e-4)
    assert swept == pytest.approx(changed[True], abs=1e-4)
    assert changed[True] != pytest.approx(changed[False], abs=1e-2)


def test_without_a_record_it_is_named_at_load(tmp_path):
    """Ours with its record gone, and a real family without one: one line, before any weight is read."""
    with pytest.raises(sb.RequestError, match="'ours', which sae-bias does not read"):
        sb.load_model(OursForCausalLM(OursConfig()), tokenizer=llama_tokenizer())
    transformers.MambaConfig(architectures=["MambaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(sb.RequestError, match=r"'mamba'.*GPT-2.*Falcon"):
        sb.load_model(tmp_path)


def test_an_opt_without_a_final_norm_is_named_at_load(make_tiny, tmp_path):
    folder = shutil.copytree(make_tiny("opt").folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"do_layer_norm_before": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(sb.RequestError, match=r"OPT.*no final norm"):
        sb.load_model(folder)

"""The search's parts against plain references: the choice against all choices, KL against torch, bytes, the recipe."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import SMOLLM2
from test_recipe import MIXTRAL, formats_of
from tiny_megatron import hf_config_of, megatron_twin, random_batches, random_llama

from megatron_edge import compose, memory
from megatron_edge.artifact import formats
from megatron_edge.contracts import InputError, ParallelPlan
from megatron_edge.jobs import search as job
from megatron_edge.jobs import search_result
from megatron_edge.quantize import search
from megatron_edge.quantize.search import Option
from megatron_edge.train import step
from megatron_edge.train.divergence import Divergence
from tests.e2e.tiny_model import write_tiny_model

option = st.builds(
    Option, st.just("x"), st.integers(1, 30), st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1e-9]))
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=6), st.integers(0, 150))
def test_the_choice_is_the_best_of_all(options: list[list[Option]], budget: int) -> None:
    def total(picked: Any) -> float:
        return sum(one.divergence for one in picked)

    fitting = [p for p in itertools.product(*options) if sum(one.size_bytes for one in p) <= budget]
    chosen = search.choose(options, budget)
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert all(one in unit for one, unit in zip(chosen, options, strict=True))
        assert sum(one.size_bytes for one in chosen) <= budget
        assert total(chosen) <= min(map(total, fitting)) + 1e-12


def test_the_choice_for_a_large_model_takes_no_time() -> None:
    """126 layers of four kinds and three formats, at a target that no price meets exactly."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(504, generator=generator).tolist()
    sizes = (1000, 700, 5200, 2600)
    options = [
        [
            Option("4", sizes[i % 4] * 4, noise[i]),
            Option("8", sizes[i % 4] * 8, noise[i] / 50),
            Option("16", sizes[i % 4] * 16, 0),
        ]
        for i in range(504)
    ]
    budget = sum(unit[0].size_bytes for unit in options) * 5 // 4 + 3
    chosen = search.choose(options, budget)
    assert chosen is not None
    used = sum(one.size_bytes for one in chosen)
    assert budget - min(sizes) * 4 < used <= budget


@pytest.mark.parametrize("sizes", [SMOLLM2, MIXTRAL], ids=["dense", "experts"])
def test_units_are_the_linear_layers_and_their_bytes(sizes: dict[str, Any]) -> None:
    run = compose.compose(["search.formats=[int4,nvfp4,fp8,none]", "train.precision=bf16"])
    units, recipes = search.units_of(sizes), job.recipes_of(run)
    assert len(units) == 4 * sizes["num_hidden_layers"]
    count = memory.count_parameters(sizes)
    assert sum(unit.num_weights for unit in units) == count.linears + count.experts
    names = ["int4", "nvfp4", "fp8", "none"]
    chosen = [names[(i * 7 + i // 4) % 4] for i in range(len(units))]
    recipe = search.as_recipe("mine", units, chosen, recipes)
    found = formats_of(run.__class__(**{**vars(run), "quant": recipe}), sizes)
    for unit, name in zip(units, chosen, strict=True):
        assert found[unit.module][:2] == (recipes[name].weight, recipes[name].activation), unit
    whole = memory.weights_bytes(run.__class__(**{**vars(run), "quant": recipe}), sizes)
    plain = memory.weights_bytes(run.__class__(**{**vars(run), "quant": recipes["none"]}), sizes)
    sized = sum(search.size_bytes(unit, recipes[name], sizes) for unit, name in zip(units, chosen, strict=True))
    assert whole - sized == plain - sum(search.size_bytes(unit, recipes["none"], sizes) for unit in units)


def test_a_kind_that_is_alike_is_one_override_and_the_file_is_an_ordinary_recipe(tmp_path: Path) -> None:
    units = search.units_of(SMOLLM2)
    recipes = job.recipes_of(compose.compose(["search.formats=[int4,fp8]"]))
    chosen = ["fp8" if "fc2" in unit.pattern or unit.layer == 3 else "int4" for unit in units]
    recipe = search.as_recipe("mixed", units, chosen, recipes)
    assert {one.pattern for one in recipe.overrides} == {
        "*.mlp.linear_fc2",
        *(
            f"decoder.layers.3.{n}"
            for n in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1")
        ),
    }
    measured = search_result.Measured("mixed", 10, 5.0, 0.1, 0.2, 0.3, 3.0, recipe)
    options = [[Option("int4", 1, 0.5), Option("fp8", 2, 0.25)] for _ in units]
    (tmp_path / "mixed.yaml").write_text(search_result.recipe_text(measured, [measured], units, options))
    read = compose.compose([f"quant.recipe={tmp_path / 'mixed.yaml'}"])
    assert formats_of(read) == formats_of(read.__class__(**{**vars(read), "quant": recipe}))
    assert "KL alone: int4 5.0e-01, fp8 2.5e-01" in (tmp_path / "mixed.yaml").read_text()
    assert read.quant.embedding == "bf16" and read.quant.calibration == "max"
    also = replace(recipe, embedding="int8", head="int8", calibration="mse")
    (tmp_path / "also.yaml").write_text(
        search_result.recipe_text(replace(measured, recipe=also), [measured], units, options)
    )
    read = compose.compose([f"quant.recipe={tmp_path / 'also.yaml'}"])
    assert (read.quant.embedding, read.quant.head, read.quant.calibration) == ("int8", "int8", "mse")


@pytest.mark.parametrize(("name", "group"), [("int4", 32), ("fp8", 0), ("nvfp4", 16)])
def test_a_layer_alone_moves_the_predictions_as_transformers_says(session: Any, name: str, group: int) -> None:
    """Weight and input of one fused layer quantised in transformers by hand; KL by torch in fp64."""
    llama = random_llama()
    hf_config, batches = hf_config_of(llama), random_batches(2)
    model = megatron_twin(llama, session)
    recipes = job.recipes_of(compose.compose([f"search.formats=[{name},none]"]))
    recipes[name] = recipes[name].__class__(**{**vars(recipes[name]), "group_size": group})
    units = search.units_of(hf_config)
    divergence = Divergence(model, batches, session)
    assert divergence(model) == 0.0

    candidates = candidates_of(model, batches, units, recipes, hf_config, session)
    plain = [None] * len(units)
    moved = search.measure(candidates, units, plain, list(recipes), divergence, 0.0, 0)
    options = search.options_of(units, recipes, hf_config, moved)
    assert [one.divergence for unit in options for one in unit[1:]] == [0.0] * len(units)
    at = next(i for i, unit in enumerate(units) if unit.pattern == "decoder.layers.1.mlp.linear_fc1")
    expected = by_hand(llama, batches, name, group, recipes[name].activation)
    assert options[at][0].divergence == pytest.approx(expected, rel=1e-3)
    assert len({one[0].divergence for one in options}) == len(units), "each layer has its own"


def candidates_of(model: Any, batches: Any, units: Any, recipes: Any, hf_config: Any, session: Any) -> Any:
    return search.candidates_of(model, units, recipes, hf_config, lambda _: step.run_forward(model, batches, session))


def test_a_layer_in_a_mix_is_measured_as_the_whole_recipe_is(session: Any) -> None:
    """Runs that begin at the layer, with quantizers that are swapped, against each recipe inserted, calibrated and run
    from the start: the same arithmetic, so the same number."""
    llama = random_llama(num_hidden_layers=3)
    hf_config, batches = hf_config_of(llama), random_batches(3)
    recipes = job.recipes_of(compose.compose(["search.formats=[int4,nvfp4,fp8,none]", "quant.embedding=int8"]))
    recipes["int4"] = recipes["int4"].__class__(**{**vars(recipes["int4"]), "group_size": 32})
    units, model = search.units_of(hf_config), megatron_twin(llama, session)
    divergence = Divergence(model, batches, session)
    whole_model = megatron_twin(llama, session)

    def whole(names: list[str]) -> float:
        recipe = search.as_recipe("mix", units, names, recipes)
        search.quantize(whole_model, recipe, hf_config, lambda _: step.run_forward(whole_model, batches, session))
        return divergence(whole_model)

    mix = [("int4", "nvfp4", "fp8", "none")[(i + i // 4) % 4] for i in range(len(units))]
    candidates = candidates_of(model, batches, units, recipes, hf_config, session)
    at = whole(mix)
    with candidates.placed(mix):
        assert divergence(model) == at
    found = search.measure(candidates, units, mix, list(recipes), divergence, at, 0)
    for index, unit in enumerate(units):
        for name in recipes:
            assert found[name][index] == whole([*mix[:index], name, *mix[index + 1 :]]), (unit, name)
    with candidates.placed([None] * len(units)):
        assert divergence(model) == 0.0, "tables too are as they came"
    assert divergence(model) > 0.0, "the model has its own quantizers again"


def test_refining_finds_what_single_layers_do_not_say(session: Any) -> None:
    """From a poor start: the refined mix fits, is measured as it says, and is no worse than the sums' choice."""
    llama = random_llama(num_hidden_layers=3)
    hf_config, batches = hf_config_of(llama), random_batches(3)
    recipes = job.recipes_of(compose.compose(["search.formats=[nvfp4_w4a16,fp8,none]"]))
    units, model = search.units_of(hf_config), megatron_twin(llama, session)
    divergence = Divergence(model, batches, session)
    candidates = candidates_of(model, batches, units, recipes, hf_config, session)
    moved = search.measure(candidates, units, [None] * len(units), list(recipes), divergence, 0.0, 0)
    options = search.options_of(units, recipes, hf_config, moved)
    budget = sum(unit.num_weights for unit in units) * 6 // 8
    chosen, poor = search.choose(options, budget), search.spread_evenly(units, options, budget)
    assert chosen is not None and poor is not None

    def whole(picked: list[Option]) -> float:
        with candidates.placed([one.name for one in picked]):
            return divergence(model)

    refined, least = search.refine(candidates, units, options, poor, budget, divergence, 3, 0)
    assert sum(one.size_bytes for one in refined) <= budget
    assert least == whole(refined) < whole(poor)
    assert least <= whole(chosen) * 1.02
    _, same = search.refine(candidates, units, options, refined, budget, divergence, 1, 0)
    assert same <= least


def test_quantizers_in_the_place_of_others_are_as_fresh_ones(session: Any) -> None:
    """modelopt keeps, of a format's first use, what another one must not find."""
    llama, batches = random_llama(), random_batches(2)
    hf_config = hf_config_of(llama)
    recipes = job.recipes_of(compose.compose(["search.formats=[int4,fp8,nvfp4]"]))
    recipes["int4"] = recipes["int4"].__class__(**{**vars(recipes["int4"]), "group_size": 32})

    def losses(*names: str) -> list[float]:
        model, found = megatron_twin(llama, session), []
        for name in names:
            search.quantize(model, recipes[name], hf_config, lambda _: step.run_forward(model, batches, session))
            found.append(step.evaluate(model, batches, session))
        return found

    fresh = {name: losses(name)[0] for name in recipes}
    chain = ("int4", "fp8", "int4", "nvfp4", "fp8", "nvfp4", "int4")
    assert losses(*chain) == [fresh[name] for name in chain]


@torch.no_grad()
def by_hand(llama: Any, batches: list[Any], name: str, group: int, activation: str) -> float:
    mlp, tokens = llama.model.layers[1].mlp, torch.cat([batch.tokens for batch in batches])
    counted = torch.cat([batch.loss_mask for batch in batches])
    seen: list[torch.Tensor] = []
    weights = [linear.weight.clone() for linear in (mlp.gate_proj, mlp.up_proj)]
    whole = torch.cat(weights)
    handle = mlp.gate_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain = llama(tokens).logits.double()[counted]
    handle.remove()
    amax = formats.snap_amax(name, formats.weight_amax(name, whole, group))
    quantised = formats.fake_quantize(name, whole, amax, group).chunk(2)
    hooks = []
    for linear, value in zip((mlp.gate_proj, mlp.up_proj), quantised, strict=True):
        linear.weight.copy_(value)
        if activation != "none":
            of_input = formats.snap_amax(activation, seen[0].abs().max())
            hooks.append(
                linear.register_forward_pre_hook(
                    lambda _, x, a=of_input: formats.fake_quantize(activation, x[0], a, 16)
                )
            )
    moved = llama(tokens).logits.double()[counted]
    for hook in hooks:
        hook.remove()
    for linear, value in zip((mlp.gate_proj, mlp.up_proj), weights, strict=True):
        linear.weight.copy_(value)
    return float(F.kl_div(moved.log_softmax(-1), plain.log_softmax(-1), log_target=True, reduction="batchmean"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("search.formats=[int4,int3]",), ("int3", "did you mean 'int4'")),
        (("search.formats=[int4_awq,fp8]",), ("int4_awq", "algorithm=awq", "int4")),
        (("search.formats=[fp8]",), ("at least two",)),
    ],
)
def test_formats_that_cannot_be_searched_are_refused(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        job.recipes_of(compose.compose(arguments))
    for word in words:
        assert word in str(caught.value)


def test_targets_are_bits_of_a_weight_or_bytes_of_the_whole() -> None:
    units = search.units_of(SMOLLM2)
    weights = sum(unit.num_weights for unit in units)
    assert job.budget_of(compose.compose(["search.target_bits=4.5"]), SMOLLM2, units) == weights * 9 // 16
    for arguments in ((), ("search.target_bits=4", "search.target_bytes=5")):
        with pytest.raises(InputError, match="exactly one"):
            job.budget_of(compose.compose(arguments), SMOLLM2, units)
    whole = compose.compose(["quant=nvfp4_w4a16", "train.precision=bf16"])
    target = memory.weights_bytes(whole, SMOLLM2)
    uniform = sum(search.size_bytes(unit, whole.quant, SMOLLM2) for unit in units)
    run = compose.compose([f"search.target_bytes={target}", "train.precision=fp32"])
    assert job.budget_of(run, SMOLLM2, units) == uniform


def test_what_cannot_be_met_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    same = (f"model.source={source}", f"run_dir={tmp_path / 'run'}", "train.seq_length_tokens=64")
    for arguments, words in (
        (("search.target_bits=4.2",), ("search.target_bits=4.2: too small", "at least 4.50", "up to 16")),
        (("search.target_bytes=400000",), ("search.target_bytes=400000: too small", "allowed: at least")),
        (("search.target_bits=5", "+scenario=gateway"), ("fp8", "board_2gb")),
        (("search.target_bits=5", "search.formats=[int4,fp8]", "parallel.tensor=2"), ("parallel.tensor=2", "128")),
    ):
        with pytest.raises(InputError) as caught:
            job.prepare(compose.compose([*same, *arguments]), ParallelPlan())
        for word in words:
            assert word in str(caught.value), str(caught.value)
    assert not (tmp_path / "run").exists()

"""parallel=auto: the simplest layout that fits, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_edge import memory
from megatron_edge.checks import check_config
from megatron_edge.compose import compose
from megatron_edge.config import RunConfig
from megatron_edge.contracts import InputError
from megatron_edge.jobs.layouts import USABLE, choose
from megatron_edge.model.hf_config import checked_config
from tools import layout_speed

DENSE = layout_speed.DENSE | {"vocab_size": 128256}
EXPERTS = DENSE | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}


def configured(*arguments: str) -> RunConfig:
    return compose(["parallel=auto", "train.precision=bf16", "train.global_batch=32", "model.source=/none", *arguments])


def sizes(raw: dict[str, Any]) -> dict[str, Any]:
    return checked_config(raw, "the test's model")


def needed(config: RunConfig, raw: dict[str, Any], choice: Any) -> int:
    plans = memory.training_plan(replace(config, parallel=choice.parallel), sizes(raw), choice.plan)
    return max(stage.total_bytes for stage in plans)


def test_with_memory_enough_all_ranks_are_data_parallel() -> None:
    choice = choose(configured(), sizes(DENSE), 8, 8, 80 * 2**30)
    assert (choice.plan.dp, choice.plan.tp, choice.plan.pp) == (8, 1, 1)
    assert choice.parallel.distributed_optimizer and choice.parallel.recompute == "none" and not choice.parallel.auto
    assert "TP1 PP1 DP8 on 8 processes" in choice.reason and "of 72.00 GiB per rank" in choice.reason


def test_with_less_the_model_is_cut_until_it_fits_and_not_further() -> None:
    config, before = configured(), 1
    for budget in (8 * 2**30, 4 * 2**30):
        choice = choose(config, sizes(DENSE), 8, 4, budget)
        ranks = choice.plan.tp * choice.plan.pp
        assert ranks > before and choice.plan.tp <= 4
        assert needed(config, DENSE, choice) <= USABLE * budget
        assert "would need" in choice.reason
        before = ranks


def test_layers_are_recomputed_only_where_no_cut_is_enough() -> None:
    config = configured("train.micro_batch=4", "train.seq_length_tokens=4096")
    assert choose(config, sizes(DENSE), 2, 2, 36 * 2**30).parallel.recompute == "none"
    choice = choose(config, sizes(DENSE), 2, 2, 28 * 2**30)
    assert choice.parallel.recompute != "none" and f"recompute={choice.parallel.recompute}" in choice.reason


def test_experts_are_spread_before_anything_is_cut() -> None:
    choice = choose(configured(), sizes(EXPERTS), 4, 4, 80 * 2**30)
    assert (choice.plan.ep, choice.plan.etp, choice.plan.tp, choice.plan.pp) == (4, 1, 1, 1)


def test_what_cannot_be_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"none of \d+ layouts of 2 processes fits 0.90 GiB per rank.*comes nearest"):
        choose(configured(), sizes(DENSE), 2, 2, 2**30)
    with pytest.raises(InputError, match=r"no layout of 7 processes .*train.global_batch=32"):
        choose(configured(), sizes(DENSE | {"num_hidden_layers": 4}), 7, 7, 80 * 2**30)


@pytest.mark.parametrize(
    "argument", ["tensor=2", "sequence=true", "recompute=full", "distributed_optimizer=true", "stage_layers=[8,8]"]
)
def test_what_auto_chooses_is_not_given_as_well(argument: str) -> None:
    name = argument.split("=")[0]
    with pytest.raises(InputError, match=rf"parallel\.{name}=.*parallel=auto"):
        check_config(configured(f"parallel.{argument}"))


def test_memory_is_a_number_of_bytes() -> None:
    with pytest.raises(InputError, match=r"parallel\.memory_bytes=0: allowed is at least 1"):
        configured("parallel.memory_bytes=0")

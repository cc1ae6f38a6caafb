from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.config import ComputeConfig, ModelConfig, ParallelConfig
from megatron.core.errors import UserError
from megatron.core.models.T5.t5_flops import model_flops_per_sequence, unit_flops_per_sequence
from megatron.core.models.T5.t5_measured_costs import measured_unit_costs
from megatron.core.models.T5.t5_pipeline import (
    StagePlan,
    choose_plan,
    format_layout,
    message_elements,
    parse_layout,
    simulate_plan,
    unit_costs,
)
from megatron.core.models.T5.t5_presets import PRESETS
from megatron.core.models.T5.t5_units import Units
from megatron.core.pipeline_parallel.cuts import even_cuts
from megatron.core.pipeline_parallel.schedules import SCHEDULES


def model(encoder_layers, decoder_layers):
    return ModelConfig(
        encoder_num_layers=encoder_layers,
        decoder_num_layers=decoder_layers,
        hidden_size=64,
        num_attention_heads=4,
        vocab_size=1000,
    )


def plan_of(encoder_layers, decoder_layers, num_microbatches, lengths=(512, 114), **flags):
    compute = {name: flags.pop(name) for name in ("recompute_granularity", "compiled") if name in flags}
    ranks = flags.pop("ranks")
    parallel = ParallelConfig(pipeline_model_parallel_size=ranks, **flags)
    return choose_plan(model(encoder_layers, decoder_layers), parallel, *lengths, num_microbatches, **compute)


XXL = ModelConfig(**PRESETS["t5-v1_1-xxl"])


def test_unit_flops_sum_to_the_models():
    flops = unit_flops_per_sequence(XXL, 512, 114)
    assert sum(flops) == model_flops_per_sequence(XXL, 512, 114) and len(flops) == len(Units.of(XXL).all)
    units = Units.of(XXL)
    encoder_layer = flops[units.encoder_layers[0]]
    assert flops[units.decoder_layers[0]] / encoder_layer == pytest.approx(0.43, abs=0.005)
    assert flops[units.head] / encoder_layer == pytest.approx(0.15, abs=0.005)
    # Embeddings and norms cost something, but next to nothing.
    costs = unit_costs(XXL, 512, 114)
    assert all(0 < costs[unit] < 0.01 * encoder_layer for unit in units.all if not flops[unit])


def test_messages():
    units = Units(3, 3)
    config = model(3, 3)
    s, t, h = 512 * 64, 114 * 64, 64
    stages = parse_layout(units, "E2|E1|D1|D1|D1|norm")
    assert message_elements(config, stages, 512, 114) == [s, s, t + s, t + s, t, 0]
    stages = parse_layout(units, "E3|norm embed|D3|norm|head")
    assert message_elements(config, stages, 512, 114) == [s, t + s, t, t, 0] and h == config.hidden_size


def all_cuts(units, inner):
    cuts = [0, *sorted(inner), units.head + 1]
    return tuple(range(a, b) for a, b in pairwise(cuts))


@given(st.data(), st.integers(1, 9), st.integers(1, 9))
def test_layout_text_is_read_back(data, encoder_layers, decoder_layers):
    units = Units(encoder_layers, decoder_layers)
    stages = all_cuts(units, data.draw(st.sets(st.integers(1, units.head))))
    text = format_layout(units, stages)
    assert parse_layout(units, text) == stages
    assert format_layout(units, parse_layout(units, f" {text.replace('|', ' | ')} ")) == text


def test_layout_texts_leave_out_what_is_where_it_belongs():
    units = Units(12, 12)
    stages = parse_layout(units, "E8|E4 D2|D10")
    assert stages == (range(9), range(9, 17), range(17, 29))
    assert format_layout(units, stages) == "E8|E4 D2|D10"
    assert format_layout(units, parse_layout(units, "E6|E6|D4*3")) == "E6*2|D4*3"
    assert parse_layout(units, "E12|norm embed D12|head") == (range(13), range(13, 28), range(28, 29))


@pytest.mark.parametrize(
    "text, message",
    [
        ("E4|E4 X|D8", "'X' is none of E<layers>, D<layers>, embed, norm, head"),
        ("E4|E04|D8", "'E04' is none of"),
        ("E4 D2*4|E4", r"'D2\*4' is none of"),
        ("E4*0|D8", r"'E4\*0' is none of"),
        ("E4|E5|D8", "has 9 encoder layers, the model has 8"),
        ("E8|D7", "has 7 decoder layers, the model has 8"),
        ("E4||E4 D8", "stage 1 is empty"),
        ("", "has 0 encoder layers"),
        ("E4 D4|E4 D4", "'E4' is out of place"),
        ("E8|head D8", "'D8' is out of place"),
        ("E8 norm|norm D8", "'norm' is out of place"),
    ],
)
def test_mistakes_in_layouts(text, message):
    with pytest.raises(UserError, match=f"^--pipeline-layout .*{message}") as error:
        parse_layout(Units(8, 8), text)
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from([2, 3, 4]),
    st.sampled_from(["auto", *SCHEDULES]),
    st.sampled_from([1, 4, 6]),
)
def test_any_model_is_cut_into_valid_stages_or_refused(encoder_layers, decoder_layers, ranks, schedule, microbatches):
    units = Units(encoder_layers, decoder_layers)
    try:
        plan = plan_of(encoder_layers, decoder_layers, microbatches, ranks=ranks, pipeline_schedule=schedule)
    except UserError as error:
        assert "\n" not in str(error) and schedule != "auto"
        # Refused only with a reason: too few microbatches or too few units for two stages a rank.
        assert "microbatches" in str(error) or (len(units.all) < 2 * ranks and "units" in str(error))
        return
    assert [unit for stage in plan.stages for unit in stage] == list(units.all)
    assert all(plan.stages) and len(plan.stages) == ranks * plan.stages_per_rank
    assert sorted(s for rank in range(ranks) for s in plan.stages_of(rank)) == list(range(len(plan.stages)))
    assert plan.schedule == schedule or schedule == "auto"
    assert parse_layout(units, plan.layout) == plan.stages
    assert len(plan.describe().splitlines()) >= 2 + len(plan.stages)


@pytest.mark.parametrize("name, stages_per_rank", [("1f1b", 1), ("interleaved", 2), ("interleaved-zb", 3), ("zbv", 2)])
def test_never_worse_than_equal_numbers_of_units_or_equal_costs(name, stages_per_rank):
    for encoder_layers, decoder_layers, lengths in [(12, 12, (512, 114)), (4, 16, (512, 114)), (14, 3, (64, 512))]:
        plan = plan_of(
            encoder_layers, decoder_layers, 12, lengths, ranks=4, pipeline_schedule=name,
            num_virtual_stages_per_pipeline_rank=stages_per_rank,
        )  # fmt: skip
        units, costs = plan.units, unit_costs(model(encoder_layers, decoder_layers), *lengths)
        time = simulate_plan(plan, 12).makespan
        for weights in ([1] * len(costs), costs):
            cuts = even_cuts(weights, len(plan.stages))
            stages = tuple(range(int(a), int(b)) for a, b in pairwise(cuts))
            other = StagePlan(units, name, 4, stages, tuple(costs))
            assert time <= 1.001 * simulate_plan(other, 12).makespan


def test_small_cases_are_solved_exactly():
    """Against every possible cut."""
    for name in ("1f1b", "zbv"):
        plan = plan_of(3, 4, 6, ranks=2, pipeline_schedule=name)
        units, costs = plan.units, unit_costs(model(3, 4), 512, 114)
        import itertools

        best = np.inf
        for inner in itertools.combinations(range(1, units.head + 1), len(plan.stages) - 1):
            stages = all_cuts(units, inner)
            other = StagePlan(units, name, 2, stages, tuple(costs))
            best = min(best, simulate_plan(other, 6).makespan)
        assert simulate_plan(plan, 6).makespan <= 1.001 * best


def test_the_same_plan_every_time():
    flags = {"ranks": 4, "num_microbatches": 16}
    assert plan_of(9, 7, **flags) == plan_of(9, 7, **flags)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv"])
def test_long_steps_are_judged_by_their_first_rounds(name):
    """What is assumed of 256 microbatches after 32 of them."""
    plan = plan_of(9, 7, 256, ranks=4, pipeline_schedule=name)
    by_hand = plan_of(9, 7, 256, ranks=4, pipeline_schedule=name, pipeline_layout=plan.layout)
    assert by_hand == plan
    whole = simulate_plan(plan, 256).makespan
    rounds = simulate_plan(plan, 32).makespan, simulate_plan(plan, 28).makespan
    assert rounds[0] + 56 * (rounds[0] - rounds[1]) == pytest.approx(whole, rel=1e-3)


def test_one_rank_has_one_stage():
    plan = plan_of(2, 2, 4, ranks=1)
    assert plan.stages == (Units(2, 2).all,) and plan.stages_of(0) == [0]


def test_auto_leaves_out_what_cannot_run():
    # 7 units on 4 ranks: one stage a rank. Fewer microbatches than ranks: no 1F1B.
    plan = plan_of(1, 1, 4, ranks=4)
    assert plan.stages_per_rank == 1 and plan.schedule == "1f1b"
    assert plan_of(1, 1, 3, ranks=4).schedule == "gpipe"
    # What a split backward pass puts off needs memory that recomputation is to save, and it does not compile.
    for compute in ({"recompute_granularity": "full"}, {"recompute_granularity": "selective"}, {"compiled": True}):
        assert not SCHEDULES[plan_of(12, 12, 16, ranks=4, **compute).schedule].splits_backward
    assert SCHEDULES[plan_of(12, 12, 16, ranks=4).schedule].splits_backward
    assert plan_of(12, 12, 16, ranks=4, pipeline_schedule="zbv", recompute_granularity="full").schedule == "zbv"
    assert plan_of(12, 12, 16, ranks=4, num_virtual_stages_per_pipeline_rank=1).schedule == "1f1b"
    assert plan_of(12, 12, 16, ranks=4, num_virtual_stages_per_pipeline_rank=3).stages_per_rank == 3


def test_a_layout_by_hand_is_kept():
    plan = plan_of(6, 6, 8, ranks=2, pipeline_layout="E3|E3|D3|D3", pipeline_schedule="zbv")
    assert plan.layout == "E3*2|D3*2" and plan.stages_of(0) == [0, 3] and plan.stages_of(1) == [1, 2]
    assert plan_of(6, 6, 8, ranks=2, pipeline_layout="E6|D6").schedule == "1f1b"


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"ranks": 8},
            "--pipeline-model-parallel-size 8 with 1 stage on each rank needs 8 stages, the model has 7 units",
        ),
        ({"ranks": 2, "num_virtual_stages_per_pipeline_rank": 4}, "needs 8 stages.*lower --num-virtual-stages"),
        (
            {"ranks": 2, "pipeline_schedule": "zbv", "num_virtual_stages_per_pipeline_rank": 3},
            "zbv has exactly 2 stages",
        ),
        ({"ranks": 2, "pipeline_schedule": "dualpipev", "microbatches": 3}, "needs at least 4 microbatches"),
        ({"ranks": 2, "pipeline_schedule": "1f1b", "microbatches": 1}, "needs at least 2 microbatches"),
        ({"ranks": 2, "pipeline_schedule": "interleaved", "microbatches": 5}, "such that they are a multiple of 2"),
        (
            {"ranks": 2, "pipeline_layout": "E1|D1|head"},
            "3 stages, which --pipeline-model-parallel-size 2 does not",
        ),
        ({"ranks": 2, "pipeline_layout": "E1|D1", "num_virtual_stages_per_pipeline_rank": 2}, "remove one of them"),
        ({"ranks": 2, "pipeline_schedule": "interleaved-zb", "compiled": True}, "which --compile cannot do"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        plan_of(1, 1, flags.pop("microbatches", 8), **flags)
    assert "\n" not in str(error.value)


def test_the_aims_at_xxl():
    """t5-v1_1-xxl, 512/114, 8 ranks, 32 microbatches; benchmarks/pipeline_schedules.py prints the whole table."""

    def busy(schedule, stages_per_rank):
        parallel = ParallelConfig(
            pipeline_model_parallel_size=8,
            pipeline_schedule=schedule,
            num_virtual_stages_per_pipeline_rank=stages_per_rank,
        )
        return simulate_plan(choose_plan(XXL, parallel, 512, 114, 32), 32).busy_fraction

    assert busy("interleaved", 4) >= 0.90
    assert busy("interleaved-zb", 4) >= 0.95


def test_simulated_time_in_seconds_with_messages():
    plan = plan_of(4, 4, 8, ranks=2, pipeline_schedule="1f1b")
    without = simulate_plan(plan, 8, seconds_per_flop=1e-12)
    assert without.makespan == pytest.approx(1e-12 * simulate_plan(plan, 8).makespan)
    late = simulate_plan(plan, 8, seconds_per_flop=1e-12, transfer_times=[1e-3])
    assert late.makespan >= without.makespan + 2e-3
    recomputed = simulate_plan(plan, 8, seconds_per_flop=1e-12, recompute=True)
    # The first rank's eighth forward pass ends after the first microbatch's way through both stages and six of its own
    # backward and forward passes; from then on it waits for the second stage, and its last backward pass ends the step.
    # Layers are recomputed; the head, whose gradients are computed in its forward pass, is not.
    first, head = plan.costs[0], plan.unit_costs[-1]
    layers = plan.costs[1] - head
    expected = [
        (1 + 6 * 3 + 2) * first + 2 * 3 * (layers + head),
        (1 + 6 * 4 + 3) * first + 2 * (4 * layers + 3 * head),
    ]
    assert [without.makespan, recomputed.makespan] == pytest.approx([1e-12 * flops for flops in expected], rel=1e-12)
    assert sum(plan.costs) > 0 and max(without.peaks_in_flight) <= 2.0


def test_measured_costs_of_units():
    config = ModelConfig(
        encoder_num_layers=3, decoder_num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=100
    )
    costs = measured_unit_costs(config, ComputeConfig(), 256, 16, 4, torch.device("cpu"), repetitions=3)
    units = Units.of(config)
    assert len(costs) == len(units.all) and min(costs) > 0
    for layers in (units.encoder_layers, units.decoder_layers):
        assert len({costs[unit] for unit in layers}) == 1
    assert costs[units.encoder_layers[0]] > costs[units.decoder_norm]
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    assert sum(choose_plan(config, parallel, 256, 16, 4, costs=costs).costs) == sum(costs)

"""LoRA adapters in a federation: the mean of what clients have learned is the mean of their products B A."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import events
from fl_tasks import make_manager
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg
from safetensors.torch import load_file
from toy_federation import asking

from fedrag_cli.config import load_config
from fedrag_cli.config.problems import InvalidConfigError
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import FederationError
from fedrag_cli.federated.aggregation import aggregate, lora_gap, require_mean
from fedrag_cli.federated.handshake import differences
from fedrag_cli.federated.lora import Factors, adapter_pairs, best_of_rank, norm_of_product, residual, stacked
from fedrag_cli.federated.validate_update import Update, screen_update
from fedrag_cli.federated.weights import manifest_of, to_wire

E1, E2 = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])


def drawn(outputs: int, rank: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, rank, generator=generator), torch.randn(rank, inputs, generator=generator)


def clients(ranks: tuple[int, ...], scalings: tuple[float, ...] = ()) -> list[Factors]:
    weights = [(number + 1) / sum(range(1, len(ranks) + 1)) for number in range(len(ranks))]
    scalings = scalings or (1.0,) * len(ranks)
    return [Factors(*drawn(7, rank, 9, number), weights[number], scalings[number]) for number, rank in enumerate(ranks)]


def mean_product(factors: list[Factors]) -> torch.Tensor:
    return sum(  # type: ignore[return-value]
        client.weight * client.scaling * client.b.double() @ client.a.double() for client in factors
    )


def product(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return pair[0].double() @ pair[1].double()


def test_the_mean_of_products_is_not_the_product_of_means() -> None:
    apart = [Factors(E1, E1.T, 0.5), Factors(E2, E2.T, 0.5)]
    naive = (E1 + E2) / 2 @ (E1 + E2).T / 2
    assert naive.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert product(stacked(apart)).tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert torch.allclose(naive.double() + product(residual(apart)), product(stacked(apart)), atol=1e-12)
    # Rank 1 cannot hold diag(.5, .5): the best that it can misses half of it.
    left = product(best_of_rank(apart)) - product(stacked(apart))
    assert float(left.norm()) == pytest.approx(0.5)


def test_opposite_factors_have_learned_the_same() -> None:
    b, a = drawn(7, 3, 9, 0)
    same = [Factors(b, a, 0.5), Factors(-b, -a, 0.5)]
    found = best_of_rank(same)
    assert torch.allclose(product(found), (b @ a).double(), atol=1e-6)
    # All directions can go on learning, and A is as large as it was.
    assert float(found[1].norm()) == pytest.approx(float(a.norm()), rel=1e-6)
    assert int(torch.linalg.matrix_rank(found[1])) == 3
    assert norm_of_product(*residual(same)) == pytest.approx(float((b @ a).norm()), rel=1e-6)


@pytest.mark.parametrize(("ranks", "scalings"), [((3, 3, 3), ()), ((2, 4, 1), (1.0, 0.5, 8.0))])
def test_stacks_are_exact_also_for_unequal_ranks_and_scalings(
    ranks: tuple[int, ...], scalings: tuple[float, ...]
) -> None:
    factors = clients(ranks, scalings)
    expected = mean_product(factors)
    b, a = stacked(factors)
    assert (b.shape, a.shape) == ((7, sum(ranks)), (sum(ranks), 9))
    assert torch.allclose(b @ a, expected, atol=1e-6)
    assert norm_of_product(b, a) == pytest.approx(float(expected.norm()), rel=1e-9)
    left, values, right = torch.linalg.svd(expected)
    rank = ranks[0]
    best = left[:, :rank] * values[:rank] @ right[:rank]
    found = best_of_rank(factors, scaling=2.0)
    assert torch.allclose(2.0 * product(found), best, atol=1e-6)


def test_average_and_residual_together_are_exact() -> None:
    factors = clients((3, 3, 3), (2.0, 2.0, 2.0))
    mean_b = sum(client.weight * client.b.double() for client in factors)
    mean_a = sum(client.weight * client.a.double() for client in factors)
    assert torch.allclose(2.0 * mean_b @ mean_a + product(residual(factors)), mean_product(factors), atol=1e-6)


def test_one_client_is_the_identity() -> None:
    (client,) = clients((3,))
    b, a = best_of_rank([client])
    assert torch.allclose(b.float(), client.b, atol=1e-6)
    assert torch.allclose(a.float(), client.a, atol=1e-6)
    assert norm_of_product(*residual([client])) < 1e-9
    # A new adapter's B is zero; A stays, or it could never learn.
    fresh = Factors(torch.zeros(7, 3), client.a, 1.0)
    b, a = best_of_rank([fresh])
    assert not b.any()
    assert torch.allclose(a.float(), client.a, atol=1e-6)


def test_the_same_a_everywhere_makes_the_mean_of_b_exact() -> None:
    shared = drawn(7, 3, 9, 5)[1]
    factors = [Factors(client.b, shared, client.weight) for client in clients((3, 3))]
    mean_b = sum(client.weight * client.b.double() for client in factors)
    assert torch.allclose(mean_b @ shared.double(), mean_product(factors), atol=1e-6)
    assert norm_of_product(*residual(factors)) < 1e-6


def test_a_layer_smaller_than_the_rank() -> None:
    factors = [Factors(*drawn(2, 5, 3, number), 0.5) for number in range(2)]
    found = best_of_rank(factors)
    assert (found[0].shape, found[1].shape) == ((2, 5), (5, 3))
    assert torch.allclose(product(found), mean_product(factors), atol=1e-6)


NAMES = ("x.lora_A.default.weight", "x.lora_B.default.weight")


def updates(privacy: Any = None) -> tuple[dict[str, Update], list[Factors], Any]:
    factors = clients((3, 3))
    start = {NAMES[0]: torch.zeros(3, 9), NAMES[1]: torch.zeros(7, 3)}
    manifest = manifest_of(start)
    found = {}
    for number, client in enumerate(factors):
        metrics = MetricRecord({"num-examples": number + 1, "loss": 1.0})
        arrays = to_wire({NAMES[0]: client.a, NAMES[1]: client.b})
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        found[f"c{number}"] = screen_update(content, manifest, to_wire(start), FederatedConfig(privacy=privacy))
    return found, factors, manifest


def test_a_round_takes_the_adapter_closest_to_the_mean_of_products() -> None:
    assert list(adapter_pairs(NAMES)) == [(NAMES[1], NAMES[0])]
    assert list(adapter_pairs(NAMES[1:])) == []
    found, factors, manifest = updates()
    reply = asking(RecordDict())
    plain = aggregate(FedAvg(), 1, found, reply, manifest, FederatedConfig())
    assert torch.allclose(plain[NAMES[1]], factors[0].b / 3 + factors[1].b * 2 / 3, atol=1e-6)
    gap = lora_gap(found, manifest)
    missed = mean_product(factors) - product((plain[NAMES[1]], plain[NAMES[0]]))
    assert gap == pytest.approx(float(missed.norm() / mean_product(factors).norm()), rel=1e-5)
    best = aggregate(FedAvg(), 1, found, reply, manifest, FederatedConfig(lora_aggregation="svd"))
    assert torch.allclose(product((best[NAMES[1]], best[NAMES[0]])), product(best_of_rank(factors)), atol=1e-5)
    closer = mean_product(factors) - product((best[NAMES[1]], best[NAMES[0]]))
    assert float(closer.norm()) < 0.8 * float(missed.norm())
    with pytest.raises(FederationError, match="svd does not go with FedAdam"):
        require_mean(FedAdam(), FederatedConfig(lora_aggregation="svd"))


def test_settings_that_do_not_go_together(write_config: Callable[..., Path]) -> None:
    def message(*overrides: str, **sections: Any) -> str:
        with pytest.raises(InvalidConfigError) as caught:
            load_config(write_config(**sections), overrides)
        return str(caught.value)

    generator = {"mode": "generator"}
    assert "none is tuned" in message("federated.lora_aggregation=svd", trainer={"mode": "retriever"})
    assert "none is tuned" in message(
        "federated.lora_aggregation=freeze_a", "trainer.generator.lora=null", trainer=generator
    )
    settings = ("federated.lora_aggregation=svd", "federated.strategy.type=FedAdam")
    assert "of which FedAdam takes no step" in message(*settings, trainer=generator)
    privacy = "federated.privacy={clipping_norm: 1, noise_multiplier: 1}"
    assert "use freeze_a or average" in message("federated.lora_aggregation=svd", privacy, trainer=generator)


def test_a_frozen_half_is_the_same_everywhere_and_stays_at_home(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    settings = FederatedConfig(min_clients=1, lora_aggregation="freeze_a")
    tasks = [make_manager(write_config, "generator").get_federated_task(settings) for _ in range(2)]
    halves = [
        {name: tensor.clone() for name, tensor in task.trainer.model.named_parameters() if ".lora_A." in name}
        for task in tasks
    ]
    assert halves[0]
    assert all(tensor.any() and torch.equal(tensor, halves[1][name]) for name, tensor in halves[0].items())
    start = tasks[0].weights()
    assert all(".lora_B." in name for name in start)
    trained = tasks[0].fit(start, {"server-round": 1}).weights
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    after = dict(tasks[0].trainer.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in halves[0].items())
    with torch.no_grad():
        dict(tasks[1].trainer.model.named_parameters())[next(iter(halves[1]))].add_(1)
    other = type(tasks[1])(tasks[1].trainer, settings)
    # B is zero there still, so the half is drawn again and fits; a trained adapter keeps its own, and is refused.
    assert not differences(tasks[0].agreement, other.agreement)
    kept = type(tasks[0])(tasks[0].trainer, settings)
    assert not differences(tasks[1].agreement, kept.agreement)
    with torch.no_grad():
        dict(tasks[0].trainer.model.named_parameters())[next(iter(halves[0]))].add_(1)
    moved = type(tasks[0])(tasks[0].trainer, settings)
    assert differences(tasks[1].agreement, moved.agreement) == ["another frozen half of the adapter's model"]


@pytest.mark.parametrize("how", ["average", "svd", "freeze_a"])
def test_adapters_are_federated_each_way(simulate: Callable[..., Any], how: str) -> None:
    run, summary = simulate("trainer.mode=generator", f"federated.lora_aggregation={how}", "evaluation.limit=2")
    gaps = [row.get("lora_gap") for row in summary["rounds"]]
    if how == "average":
        # In the first round all clients have the same A to begin with, and later they drift apart.
        assert all(gap is not None and 0 < gap < math.sqrt(2) for gap in gaps)
    else:
        assert gaps == [None, None]
    saved = load_file(run / "generator" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in saved)
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    sent = {event["bytes_received"] for event in events(run, "client_update")}
    (size,) = sent
    whole = sum(tensor.numel() * 4 + 128 for tensor in saved.values())
    half = sum(tensor.numel() * 4 + 128 for name, tensor in saved.items() if "lora_B" in name)
    assert size == (half if how == "freeze_a" else whole)

"""The losses against the numbers of the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch

from fedrag_cli.errors import TrainingError
from fedrag_cli.losses import LSRLoss, lsr_loss, proximal_penalty

RETRIEVAL_SCORES = torch.tensor([[0.9, 0.5, 0.1]])
LM_SCORES = torch.tensor([[-1.0, -2.0, -4.0]])


def plain_loss(retrieval: torch.Tensor, lm: torch.Tensor, **settings: object) -> torch.Tensor:
    return lsr_loss(retrieval, lm, **({"retriever_temperature": 1.0, "lm_temperature": 1.0} | settings))  # type: ignore[arg-type]


def gradient(retriever_temperature: float, divergence: str = "forward") -> list[float]:
    scores = RETRIEVAL_SCORES.clone().requires_grad_()
    plain_loss(scores, LM_SCORES, retriever_temperature=retriever_temperature, divergence=divergence).sum().backward()
    assert scores.grad is not None
    return scores.grad[0].tolist()


def test_both_directions() -> None:
    assert plain_loss(RETRIEVAL_SCORES, LM_SCORES).item() == pytest.approx(0.169279, abs=1e-6)
    assert plain_loss(RETRIEVAL_SCORES, LM_SCORES, divergence="reverse").item() == pytest.approx(0.253868, abs=1e-6)


def test_the_gradient_and_the_temperature() -> None:
    assert gradient(1.0) == pytest.approx([-0.233608, 0.056745, 0.176864], abs=1e-6)
    assert plain_loss(RETRIEVAL_SCORES, LM_SCORES, retriever_temperature=0.1).item() == pytest.approx(
        0.623552, abs=1e-6
    )
    assert gradient(0.1) == pytest.approx([2.763059, -2.415162, -0.347897], abs=1e-5)


def test_the_gradient_of_the_reverse_direction() -> None:
    # d KL(P || Q) / d s_i = P_i * (log(P_i / Q_i) - KL(P || Q)).
    p, q = [0.47178, 0.31624, 0.21198], [0.70538, 0.25950, 0.03512]
    expected = [a * (math.log(a / b) - 0.253868) for a, b in zip(p, q, strict=True)]
    assert gradient(1.0, "reverse") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_equal_scores_have_no_loss_and_no_gradient(divergence: str) -> None:
    scores = torch.full((2, 5), 0.3, requires_grad=True)
    loss = plain_loss(scores, torch.full((2, 5), -7.0), divergence=divergence)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert scores.grad is not None
    assert scores.grad.abs().max().item() < 1e-7


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_constant_changes_nothing(divergence: str) -> None:
    loss = plain_loss(RETRIEVAL_SCORES, LM_SCORES, divergence=divergence)
    torch.testing.assert_close(plain_loss(RETRIEVAL_SCORES + 3, LM_SCORES, divergence=divergence), loss)
    torch.testing.assert_close(plain_loss(RETRIEVAL_SCORES, LM_SCORES - 100, divergence=divergence), loss)


def test_one_passage_has_no_loss() -> None:
    assert plain_loss(torch.tensor([[0.7]]), torch.tensor([[-3.0]])).tolist() == [0.0]


def test_small_likelihoods_do_not_underflow() -> None:
    loss = plain_loss(torch.zeros(1, 3), torch.tensor([[-20.0, -25.0, -30.0]]))
    q = [0.99326, 0.00669, 0.00005]
    assert loss.item() == pytest.approx(math.log(3) + sum(x * math.log(x) for x in q), abs=1e-3)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_big_magnitudes(divergence: str) -> None:
    scores = torch.tensor([[1.0, -1.0, 0.5]], requires_grad=True)
    loss = lsr_loss(scores, torch.tensor([[-1000.0, -10.0, -1005.0]]), divergence=divergence)  # type: ignore[arg-type]
    loss.sum().backward()
    assert scores.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(scores.grad).all()
    if divergence == "forward":
        # Q is all on the second passage, whose log P_R is -40 with the temperature .05.
        assert loss.item() == pytest.approx(40.0, abs=1e-3)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("absent", [-torch.inf, torch.nan, 1e30])
def test_absent_passages_count_for_nothing(divergence: str, absent: float) -> None:
    scores = torch.tensor([[0.9, 0.5, absent, 0.1], [0.2, absent, absent, absent]], requires_grad=True)
    lm_scores = torch.tensor([[-1.0, -2.0, absent, -4.0], [-3.0, absent, absent, absent]])
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    loss = plain_loss(scores, lm_scores, divergence=divergence, mask=mask)
    loss.sum().backward()
    expected = 0.169279 if divergence == "forward" else 0.253868
    assert loss.tolist() == pytest.approx([expected, 0.0], abs=1e-6)
    assert scores.grad is not None
    present = scores.grad[0][mask[0]].tolist()
    assert present == pytest.approx(gradient(1.0, divergence), abs=1e-6)
    assert scores.grad[~mask].tolist() == [0.0] * 4
    assert scores.grad[1, 0].item() == 0.0


def test_the_mean_is_over_the_batch_alone() -> None:
    retrieval, lm = RETRIEVAL_SCORES.repeat(4, 1), LM_SCORES.repeat(4, 1)
    loss = LSRLoss(retriever_temperature=1.0, lm_temperature=1.0)
    assert loss(retrieval, lm).item() == pytest.approx(0.169279, abs=1e-6)
    assert loss(retrieval, lm).shape == ()
    assert plain_loss(retrieval, lm).shape == (4,)
    assert loss(retrieval, lm, mask=torch.ones(4, 3, dtype=torch.bool)).item() == pytest.approx(0.169279, abs=1e-6)


def test_equals_the_divergence_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    retrieval, lm = torch.randn(8, 10, generator=generator), torch.randn(8, 10, generator=generator)
    expected = torch.nn.functional.kl_div(
        (retrieval / 0.05).log_softmax(-1), (lm / 0.1).log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(LSRLoss()(retrieval, lm), expected)


def test_the_language_model_gets_no_gradient() -> None:
    scores, lm_scores = RETRIEVAL_SCORES.clone().requires_grad_(), LM_SCORES.clone().requires_grad_()
    LSRLoss()(scores, lm_scores).backward()
    assert lm_scores.grad is None
    assert scores.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    # Scores that half precision holds exactly.
    retrieval, lm = torch.tensor([[0.75, 0.5, 0.125]]), torch.tensor([[-1.0, -2.0, -4.0]])
    scores = retrieval.to(dtype).requires_grad_()
    loss = plain_loss(scores, lm.to(dtype))
    assert loss.dtype == torch.float32
    assert loss.item() == plain_loss(retrieval, lm).item()
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.dtype == dtype


def test_double_precision_is_kept() -> None:
    assert plain_loss(RETRIEVAL_SCORES.double(), LM_SCORES.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("retrieval", "lm", "message"),
    [
        (torch.zeros(3), torch.zeros(3), r"retrieval_scores has the shape \(3,\)"),
        (torch.zeros(2, 0), torch.zeros(2, 0), r"retrieval_scores has the shape \(2, 0\)"),
        (torch.zeros(0, 3), torch.zeros(0, 3), r"retrieval_scores has the shape \(0, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"lm_scores has the shape \(2, 4\)"),
        (torch.zeros(2, 3), torch.zeros(1, 3), r"lm_scores has the shape \(1, 3\)"),
        (torch.tensor([[0.0], [torch.nan]]), torch.zeros(2, 1), r"retrieval_scores holds NaN .* examples \[1\]"),
        (torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]]), r"lm_scores holds NaN or infinity .* \[0\]"),
    ],
)
def test_bad_inputs_are_named(retrieval: torch.Tensor, lm: torch.Tensor, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        lsr_loss(retrieval, lm)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 2, dtype=torch.bool), r"mask has the shape \(1, 2\)"),
        (torch.ones(1, 3), "boolean"),
        (torch.zeros(1, 3, dtype=torch.bool), r"no passage for the examples \[0\]"),
    ],
)
def test_bad_masks_are_named(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        lsr_loss(RETRIEVAL_SCORES, LM_SCORES, mask=mask)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retriever_temperature": 0.0}, "retriever_temperature is 0"),
        ({"lm_temperature": -1.0}, "lm_temperature is -1"),
        ({"lm_temperature": float("nan")}, "lm_temperature is nan"),
        ({"divergence": "sideways"}, "sideways"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        LSRLoss(**settings)  # type: ignore[arg-type]


def test_the_module_prints_its_settings() -> None:
    assert repr(LSRLoss()) == "LSRLoss(retriever_temperature=0.05, lm_temperature=0.1, divergence='forward')"


def test_the_proximal_penalty_is_zero_at_the_global_weights() -> None:
    model = torch.nn.Linear(3, 2)
    reference = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    penalty = proximal_penalty(model.named_parameters(), reference, mu=0.1)
    penalty.backward()
    assert penalty.item() == 0.0
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max().item() == 0.0


def test_the_proximal_penalty_elsewhere() -> None:
    theta = {"a": torch.tensor([1.0, 2.0], requires_grad=True), "b": torch.tensor([[3.0]], requires_grad=True)}
    reference = {"b": torch.tensor([[1.0]], requires_grad=True), "a": torch.tensor([0.0, 4.0])}
    penalty = proximal_penalty(theta.items(), reference, mu=0.5)
    penalty.backward()
    # Half of .5 times (1 + 4 + 4).
    assert penalty.item() == pytest.approx(2.25)
    assert theta["a"].grad is not None
    assert theta["b"].grad is not None
    assert theta["a"].grad.tolist() == [0.5, -1.0]
    assert theta["b"].grad.tolist() == [[1.0]]
    assert reference["b"].grad is None


def test_the_proximal_penalty_of_small_steps_in_half_precision() -> None:
    theta = torch.full((4,), 2.0**-10, dtype=torch.bfloat16)
    penalty = proximal_penalty([("a", theta)], {"a": torch.zeros(4)}, mu=2.0)
    assert penalty.dtype == torch.float32
    assert penalty.item() == 4 * 2.0**-20


@pytest.mark.parametrize(
    ("names", "reference_names", "message"),
    [
        (["a", "b"], ["a"], "the global weights lack b"),
        (["a"], ["a", "c"], "the client does not train c"),
        ([], [], "no trained tensor"),
    ],
)
def test_other_names_are_an_error(names: list[str], reference_names: list[str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        proximal_penalty([(name, torch.zeros(1)) for name in names], dict.fromkeys(reference_names, torch.zeros(1)), 1)


def test_other_shapes_and_a_negative_mu_are_an_error() -> None:
    with pytest.raises(TrainingError, match=r"'a' has the shape \(2,\), but \(1,\)"):
        proximal_penalty([("a", torch.zeros(2))], {"a": torch.zeros(1)}, mu=1.0)
    with pytest.raises(TrainingError, match="mu is -1"):
        proximal_penalty([("a", torch.zeros(1))], {"a": torch.zeros(1)}, mu=-1.0)
